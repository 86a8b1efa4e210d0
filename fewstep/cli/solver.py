"""`fewstep solver fit`: solver weights that make a base few-step, fitted without training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from fewstep.cli.fitting import FitOptions, make_recipe
from fewstep.cli.output import Output
from fewstep.errors import ConfigError

HELP = """\
Fit a solver's weights so that a base, as it is, comes near its own many-step pictures in few calls.
No training; the result is a recipe file.

  d-ode        one number per step (arXiv:2309.16421); fast; also on a searched grid
  bespoke-rk1  grid and weights of every step (arXiv:2310.19075); --rounds x 3 x --steps rollouts
  bespoke-rk2  the same with a midpoint: --steps calls make half as many steps; best at 4 and more

Examples:
  fewstep solver fit --kind bespoke-rk2 --base digits-sd3 --steps 4 8 --out solver.json
  fewstep generate --base digits-sd3 --recipe solver.json --prompt "a handwritten seven"
  fewstep solver fit --kind d-ode --base digits-sd3 --grid grids.json --steps 4 --out d-ode.json
  fewstep solver fit --kind d-ode --base ./my-sdxl --steps 8 --guidance 6 --num-images 8 \\
      --batch-size 1 --precision float16 --out sdxl-8.json"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver(FitOptions):
    """Fit a few-step solver to a base, without training."""

    action: Positional[Literal["fit"]]
    """What to do."""
    kind: Literal["d-ode", "bespoke-rk1", "bespoke-rk2"]
    """Which solver."""
    grid: Path | None = None
    """Recipe whose grids to start from (fewstep grid search); even ones where none is given."""
    rounds: int = 8
    """Linearisations of a Bespoke fit."""


def run(options: Solver, output: Output) -> None:
    """Fit, write the recipe, print what was won."""
    from fewstep.recipe_resolution import read_recipe
    from fewstep.solvers.training_free import count_fit_calls, fitted_recipe

    if options.rounds < 1:
        raise ConfigError(f"--rounds must be >= 1, got {options.rounds}")
    start = None if options.grid is None else read_recipe(options.grid)
    make_recipe(
        options,
        output,
        label=f"fitting {options.kind}",
        num_calls=count_fit_calls(
            options.kind, options.steps, options.teacher_steps, options.rounds
        ),
        fit=lambda problem: fitted_recipe(
            problem, options.kind, options.steps, on=start, num_rounds=options.rounds
        ),
    )
