"""Combinations that cannot work are refused before anything is trained, with the reason."""

from fewstep.errors import ConfigError
from fewstep.trainer.context import Setting
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.stages import Stage


def validate(frame: Frame, stages: tuple[Stage, ...], setting: Setting) -> None:
    """Check the stages of a method against each other and the run.

    Raises:
        ConfigError: A rule is broken; the message says which and why.
    """
    if not stages:
        raise ConfigError(f"method {frame.config.method.facts.name} has no stage with steps")
