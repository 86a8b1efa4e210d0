"""`fewstep demo`: distil the shipped digits teacher, draw with the result, score it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from fewstep.cli.output import Output, OutputOptions

HELP = """\
Distil the shipped digits teacher into a 4-step adapter on this machine's CPU, draw with it, and
score it against the real handwriting.

Writes into --out:
  adapter/      the few-step LoRA, its recipe inside
  grid.png      teacher at 50 and 4 steps, student at 4, 2 and 1; same prompts, same seeds
  curves.png    what happened during training
  report.json   one row per sampler; report.md is the same for people

Examples:
  fewstep demo --out demo-out                  about ten minutes on two cores
  fewstep demo --out demo-out --quick          about three minutes, a rougher student
  fewstep demo --out demo-out --teacher sd15   the epsilon-prediction UNet in place of SD3"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """Distil the shipped digits teacher into a 4-step adapter, draw with it, score it."""

    out: Path = Path("demo-out")
    """Folder to write into; made if missing."""
    quick: bool = False
    """Train for a shorter time; the student is rougher."""
    full: bool = False
    """Score the teacher again too, in place of the figures that ship with its weights."""
    teacher: Literal["sd3", "sd15"] = "sd3"
    """Which shipped teacher: the flow transformer (sd3) or the epsilon UNet (sd15)."""
    seed: int = 0
    """Seed of training and of every picture."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


def run(options: Demo, output: Output) -> None:
    """Run the demo and print its report."""
    from fewstep.trainer.demo import run_demo

    run_demo(
        options.out,
        quick=options.quick,
        full=options.full,
        teacher=options.teacher,
        seed=options.seed,
        quiet=output.is_silent,
    )
    report = json.loads((options.out / "report.json").read_text(encoding="utf-8"))
    output.result(report, (options.out / "report.md").read_text(encoding="utf-8"))
