"""`fewstep grid search`: the best few-step grid of a base, found without training."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from fewstep.cli.fitting import FitOptions, make_recipe
from fewstep.cli.output import Output

HELP = """\
Find the step grids at which a base, as it is, comes nearest to its own many-step pictures (Optimal
Stepsize, arXiv:2503.21774: exact dynamic programming over one fine trajectory). No training; the
result is a recipe file, used with any number of prompts.

Examples:
  fewstep grid search --base digits-sd3 --steps 2 4 8 --out grids.json
  fewstep generate --base digits-sd3 --recipe grids.json --prompt "a handwritten seven"
  fewstep grid search --base ./my-sdxl --steps 8 --prompts prompts.txt --guidance 6 \\
      --size 1024x1024 --num-images 8 --batch-size 1 --precision float16 --out sdxl-8.json

Network calls: one per teacher step, and again for every step count up to the highest (96 x 8 for
--steps 8). `fewstep solver fit --grid grids.json` improves on what is found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid(FitOptions):
    """Find the best few-step grids of a base, without training."""

    action: Positional[Literal["search"]]
    """What to do."""


def run(options: Grid, output: Output) -> None:
    """Search, write the recipe, print what was won."""
    from fewstep.solvers.optimal_steps import count_calls
    from fewstep.solvers.training_free import searched_recipe

    highest = max(options.steps)
    calls = count_calls(options.teacher_steps, options.steps) if highest > 0 else 0
    make_recipe(
        options,
        output,
        label="searching",
        num_calls=calls,
        fit=lambda problem: searched_recipe(problem, options.steps),
    )
