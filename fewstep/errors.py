"""Every error fewstep raises on purpose.

    FewstepError
    +-- ConfigError (ValueError)         a setting is wrong
    +-- RecipeError (ValueError)         a recipe breaks its own rules
    |   +-- RecipeVersionError           written by a newer format than this release reads
    +-- RecipeNotFoundError (LookupError)  nothing says how this adapter wants to be sampled
    +-- AdapterError (ValueError)        an adapter file is damaged or does not fit the base
    +-- ShapeError (ValueError)          arrays of different shapes met
    +-- CheckpointError (RuntimeError)   a run folder cannot be continued
    +-- TrainingError (RuntimeError)     a run went wrong and stopped itself
    +-- PipelineError (ValueError)       a pipeline cannot do what was asked of it
    +-- ExportError (ValueError)         a pipeline or graph cannot be exported as asked
    +-- ExportFolderError (ValueError)   an export folder is damaged or of another release
    +-- RuntimeSettingError (ValueError) an exported model cannot do what was asked of it
    +-- GenerationStopped (RuntimeError) somebody asked for a picture in work to be stopped
    +-- MissingExtraError (ImportError)  an optional dependency is not installed

Messages are one sentence: what we got, what was wanted, what to do.
"""


class FewstepError(Exception):
    """Root of the tree: catch this to catch everything fewstep raises on purpose."""


def command_message(error: Exception) -> str:
    """What a command prints of an error: options in place of Python's arguments."""
    return error.for_commands if isinstance(error, RecipeNotFoundError) else str(error)


class ConfigError(FewstepError, ValueError):
    """A setting is out of range, unknown or in conflict with another."""


class RecipeError(FewstepError, ValueError):
    """A recipe is not valid; the message names the field."""


class RecipeVersionError(RecipeError):
    """The recipe was written by a newer major format than this release understands."""


class RecipeNotFoundError(FewstepError, LookupError):
    """No source says how this model wants to be sampled.

    Args:
        message: For callers in Python, who pass recipe=.
        for_commands: The same for users of a command, who give --recipe; None where it is the same.
    """

    def __init__(self, message: str, for_commands: str | None = None) -> None:
        super().__init__(message)
        self.for_commands = message if for_commands is None else for_commands


class AdapterError(FewstepError, ValueError):
    """An adapter file is damaged, or does not fit the base it is asked to change."""


class ShapeError(FewstepError, ValueError):
    """Arrays that must have equal shapes do not."""


class CheckpointError(FewstepError, RuntimeError):
    """A run folder cannot be read or continued."""


class TrainingError(FewstepError, RuntimeError):
    """A run went wrong in a way that going on would make worse."""


class PipelineError(FewstepError, ValueError):
    """A pipeline cannot do what was asked of it."""


class ExportError(FewstepError, ValueError):
    """A pipeline, graph or engine cannot be made as asked."""


class ExportFolderError(FewstepError, ValueError):
    """An export folder is damaged, incomplete or of another release."""


class RuntimeSettingError(FewstepError, ValueError):
    """An exported model cannot do what was asked of it: a size, a provider, a step count."""


class GenerationStopped(FewstepError, RuntimeError):
    """A picture in work was stopped on request."""


class MissingExtraError(FewstepError, ImportError):
    """An optional dependency is missing.

    Args:
        package: What could not be imported.
        extra: The fewstep extra that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed; run: pip install "fewstep[{extra}]"')
