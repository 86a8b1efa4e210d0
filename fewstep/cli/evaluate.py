"""`fewstep eval`: score a few-step adapter of a digits teacher."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from fewstep.cli.bases import resolve_base
from fewstep.cli.output import Output, OutputOptions, rows_table
from fewstep.errors import ConfigError

HELP = """\
Draw many digits with an adapter and compare them with the real handwriting, in the feature space
of the shipped classifier: Frechet distance, accuracy, recall, diversity, seconds per picture.

Examples:
  fewstep eval demo-out/adapter/student.safetensors
  fewstep eval student.safetensors --steps 4 2 1 --num-images 500 --json
  fewstep eval student.safetensors --teacher-steps 50 4   rows of its teacher for comparison
  fewstep eval student.safetensors --base digits-sd15"""

COLUMNS = (
    "name",
    "sampler",
    "steps",
    "nfe",
    "frechet",
    "accuracy",
    "recall",
    "diversity",
    "seconds_per_image",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Score an adapter of a digits teacher against the real handwriting."""

    adapter: Positional[Path]
    """The few-step adapter, a .safetensors file."""
    base: str = "digits-sd3"
    """The teacher it was made from: digits-sd3, digits-sd15 or a folder of that kind."""
    steps: tuple[int, ...] = ()
    """Step counts, one row each; the recipe's own default where none is given."""
    teacher_steps: tuple[int, ...] = ()
    """Step counts at which to score the teacher too."""
    guidance_scale: float = 1.0
    """The teacher's guidance, w in uncond + w * (cond - uncond); 1 is off."""
    num_images: int = 2000
    """Pictures of each row, classes balanced. Frechet distances of fewer are higher."""
    seed: int = 0
    """Seed of the evaluation; the same for every row."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()

    def __post_init__(self) -> None:
        if self.guidance_scale != 1.0 and not self.teacher_steps:
            raise ConfigError("--guidance-scale is the teacher's; give --teacher-steps too")


def run(options: Evaluate, output: Output) -> None:
    """Draw, score, print."""
    from fewstep.digits.evaluate import evaluate_adapter

    with output.progress() as progress:
        report = evaluate_adapter(
            resolve_base(options.base),
            options.adapter,
            steps=options.steps,
            num_images=options.num_images,
            seed=options.seed,
            teacher_steps=options.teacher_steps,
            guidance_scale=options.guidance_scale,
            progress=progress,
        )
    output.result(report, rows_table(report["rows"], COLUMNS))
