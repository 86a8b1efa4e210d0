"""`fewstep <verb>`: picks the verb, runs it, turns errors into exit statuses.

Exit status: 0 done, 1 a bug in fewstep (with a traceback), 2 the request cannot be served (one
sentence on stderr), 3 `fewstep doctor` found what spoils pictures, or `fewstep comfy install
--check` a pack that is not ready, 130 stopped with Ctrl-C.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, Union

import tyro

from fewstep import __version__
from fewstep.cli import (
    comfy,
    convert,
    demo,
    doctor,
    draw,
    evaluate,
    generate,
    grid,
    inspect,
    solver,
    zoo,
)
from fewstep.cli.output import Output
from fewstep.errors import FewstepError, command_message
from fewstep.extras import missing_extra

DESCRIPTION = """\
Few-step diffusion: distil a teacher into a LoRA that draws in 1 to 8 steps, and sample it right.

Examples:
  fewstep demo --out demo-out --quick
  fewstep inspect demo-out/adapter/student.safetensors
  fewstep generate --base digits-sd3 --adapter student.safetensors --prompt "a handwritten seven"

fewstep <verb> --help shows examples of each verb. Exit status: 0 done, 2 the request cannot be
served (the reason on stderr), 130 stopped with Ctrl-C."""

USER_ERROR = 2
STOPPED = 130


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: its options (a dataclass), its long help, and what it does."""

    options: Any
    help: str
    run: Callable[[Any, Output], None]


@dataclass(frozen=True, slots=True)
class Train:
    """Make an adapter; the same as `python -m fewstep.trainer` (fewstep train --list)."""


@dataclass(frozen=True, slots=True)
class Export:
    """Make a folder that draws without torch; the same as `python -m fewstep.export`."""


VERBS = {
    "demo": Verb(demo.Demo, demo.HELP, demo.run),
    "generate": Verb(generate.Generate, generate.HELP, generate.run),
    "draw": Verb(draw.Draw, draw.HELP, draw.run),
    "inspect": Verb(inspect.Inspect, inspect.HELP, inspect.run),
    "eval": Verb(evaluate.Evaluate, evaluate.HELP, evaluate.run),
    "convert": Verb(convert.Convert, convert.HELP, convert.run),
    "comfy": Verb(comfy.Comfy, comfy.HELP, comfy.run),
    "doctor": Verb(doctor.Doctor, doctor.HELP, doctor.run),
    "zoo": Verb(zoo.Zoo, zoo.HELP, zoo.run),
    "grid": Verb(grid.Grid, grid.HELP, grid.run),
    "solver": Verb(solver.Solver, solver.HELP, solver.run),
}
CONFIG = (tyro.conf.FlagCreatePairsOff,)


def run() -> NoReturn:
    """Entry point of the `fewstep` program."""
    # A reader of the terminal is helped by the sentence, not by a line of our source.
    warnings.formatwarning = lambda message, *_: f"fewstep: {message}\n"
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command line.

    Args:
        argv: Arguments after the program's name.

    Returns:
        The exit status; see the module's docstring.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes on optional parts are not ours
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        return _dispatch(list(argv))
    except SystemExit as stop:  # tyro's way to say: help was shown (0), or wrong usage (2)
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    except KeyboardInterrupt:
        return _fail("stopped", STOPPED)
    except BrokenPipeError:  # `fewstep inspect ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        return _fail(str(missing), USER_ERROR)
    except (FewstepError, OSError) as error:
        return _fail(command_message(error), USER_ERROR)


def _dispatch(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name == "train":
        from fewstep.trainer.__main__ import main as train

        return train(argv[1:])
    if name == "export":
        from fewstep.export.__main__ import main as export

        return export(argv[1:])
    if argv[:2] == ["doctor", "train"]:
        from fewstep.trainer.doctor.__main__ import main as doctor_train

        return doctor_train(argv[2:])
    if name == "--version":
        sys.stdout.write(f"fewstep {__version__}\n")
        return 0
    if name not in VERBS:
        _explain(argv)
        return USER_ERROR
    verb = VERBS[name]
    options = tyro.cli(
        verb.options, prog=f"fewstep {name}", description=verb.help, args=argv[1:], config=CONFIG
    )
    output = Output(options.output)
    logging.basicConfig(
        level=logging.ERROR if output.is_silent else logging.WARNING, format="fewstep: %(message)s"
    )
    verb.run(options, output)
    return 0


def _explain(argv: list[str]) -> None:
    """Show the list of verbs (`--help`) or what is wrong with the command line; always exits."""
    ours = {name: verb.options for name, verb in VERBS.items()}
    kinds = {"train": Train, "export": Export, **ours}
    choices = tuple(
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)]
        for name, kind in kinds.items()
    )
    any_verb: Any = Union[choices]  # noqa: UP007  (built at run time)
    tyro.cli(
        any_verb,
        prog="fewstep",
        description=DESCRIPTION,
        args=argv or ["--help"],
        config=CONFIG,
    )


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"fewstep: {' '.join(message.split())}\n")
    return status
