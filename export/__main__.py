"""`python -m fewstep.export`: folders, graphs and engines of a few-step model.

Exit status: 0 done, 2 the request cannot be served (one sentence on stderr), 130 stopped.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console

from fewstep.errors import FewstepError, command_message
from fewstep.export import feeds_command, onnx_command
from fewstep.export.checking import command as check_command
from fewstep.export.quantizing import command as quantize_command
from fewstep.export.tensorrt import command as trt_command
from fewstep.export.triton import command as triton_command
from fewstep.extras import missing_extra

USER_ERROR = 2
STOPPED = 130


@dataclass(frozen=True, slots=True)
class Verb:
    """One sub-command: its options (a dataclass), its long help, and what it does."""

    options: Any
    help: str
    run: Callable[[Any, Console], None]


VERBS = {
    "onnx": Verb(onnx_command.OnnxOptions, onnx_command.HELP, onnx_command.run),
    "check": Verb(check_command.CheckOptions, check_command.HELP, check_command.run),
    "quantize": Verb(quantize_command.QuantizeOptions, quantize_command.HELP, quantize_command.run),
    "feeds": Verb(feeds_command.FeedsOptions, feeds_command.HELP, feeds_command.run),
    "tensorrt": Verb(trt_command.TensorRtOptions, trt_command.HELP, trt_command.run),
    "triton": Verb(triton_command.TritonOptions, triton_command.HELP, triton_command.run),
}
CONFIG = (tyro.conf.FlagCreatePairsOff,)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    given = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True)
    try:
        return _dispatch(given, console)
    except SystemExit as stop:  # tyro's way to say: help was shown (0), or wrong usage (2)
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    except KeyboardInterrupt:
        console.print("fewstep export: stopped; nothing was left behind", highlight=False)
        return STOPPED
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        return _fail(console, str(missing))
    except (FewstepError, OSError) as error:
        return _fail(console, command_message(error))


def _dispatch(argv: list[str], console: Console) -> int:
    name = argv[0] if argv else ""
    if name not in VERBS:
        lines = [f"  {name:10s} {_first(verb.help)}" for name, verb in VERBS.items()]
        is_help = name in ("", "-h", "--help")
        if not is_help:
            print(f"fewstep export: unknown command {name!r}", file=sys.stderr)
        text = "fewstep export COMMAND --help shows options and examples.\n\n" + "\n".join(lines)
        print(text, file=sys.stdout if is_help else sys.stderr)
        return 0 if is_help else USER_ERROR
    verb = VERBS[name]
    options = tyro.cli(
        verb.options,
        prog=f"fewstep export {name}",
        description=verb.help,
        args=argv[1:],
        config=CONFIG,
    )
    verb.run(options, console)
    return 0


def _first(text: str) -> str:
    return text.partition("\n")[0]


def _fail(console: Console, message: str) -> int:
    text = f"fewstep export: {message}"
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
