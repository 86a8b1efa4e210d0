"""Few-step recipes without training: a base, some prompts, and a search or a fit against itself.

    problem = prepare(pipe, FitSettings(prompts=..., guidance_scale=4.5))
    recipe = searched_recipe(problem, (4, 8))

The teacher is the base at many even steps with the same guidance. Nothing of the network changes,
so a recipe made here is the only file that is needed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import fewstep
from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level
from fewstep.recipe import FewStepRecipe, Grid, Provenance
from fewstep.solvers import bespoke, optimal_steps
from fewstep.solvers.d_ode import fit_d_ode
from fewstep.solvers.flow_frame import even_levels, grid_of, refined_levels
from fewstep.solvers.problem import Problem
from fewstep.solvers.scale_time import RK1, RK2, Method
from fewstep.solvers.teacher_path import teacher_states

Kind = Literal["d-ode", "bespoke-rk1", "bespoke-rk2"]
METHODS: dict[str, Method] = {RK1.name: RK1, RK2.name: RK2}
SOURCES = {
    "optimal steps": "arXiv:2503.21774",
    "d-ode": "arXiv:2309.16421",
    "bespoke-rk1": "arXiv:2310.19075",
    "bespoke-rk2": "arXiv:2310.19075",
}


def searched_recipe(problem: Problem, step_counts: Sequence[int]) -> FewStepRecipe:
    """Optimal grids (`optimal_steps`) of several step counts, by one search.

    Raises:
        ConfigError: A step count above the teacher's.
    """
    found = optimal_steps.optimal_grids(
        problem.denoise, problem.sample, problem.teacher_levels, step_counts
    )
    errors = {count: (f.error, f.even_error) for count, f in found.items()}
    grids = tuple(grid_of(found[count].levels) for count in sorted(found))
    return _finished(problem, "optimal steps", grids, errors)


def fitted_recipe(
    problem: Problem,
    kind: Kind,
    step_counts: Sequence[int],
    *,
    on: FewStepRecipe | None = None,
    num_rounds: int = bespoke.NUM_ROUNDS,
) -> FewStepRecipe:
    """Fitted solvers of several step counts.

    Args:
        problem: From `prepare`.
        kind: Which solver.
        step_counts: Network calls per image (half as many steps for "bespoke-rk2").
        on: A recipe of the same base whose grids to fit on; even grids where none is given.
        num_rounds: Of Bespoke fits.

    Raises:
        ConfigError: An odd count for "bespoke-rk2", or `on` with it.
        RecipeError: `on` does not have such a step count.
    """
    grids: list[Grid] = []
    errors: dict[int, tuple[float, float]] = {}
    for count in sorted(set(step_counts)):
        levels = _start_levels(problem, kind, count, on)
        if kind == "d-ode":
            grid, error, plain = _d_ode(problem, levels)
        else:
            grid, error, plain = _bespoke(problem, METHODS[kind], levels, num_rounds)
        grids.append(grid)
        errors[count] = (error, plain)
    return _finished(problem, kind, tuple(grids), errors)


def count_fit_calls(
    kind: Kind, step_counts: Sequence[int], teacher_steps: int, num_rounds: int
) -> int:
    """Network calls of `fitted_recipe`, about."""
    total = 0
    for count in step_counts:
        if kind == "d-ode":
            total += count * max(1, round(teacher_steps / count)) + 2 * count
        else:
            total += teacher_steps + bespoke.count_calls(count, METHODS[kind], num_rounds)
    return total


def _start_levels(
    problem: Problem, kind: Kind, count: int, on: FewStepRecipe | None
) -> tuple[Level, ...]:
    if kind != "bespoke-rk2":
        return even_levels(problem.schedule, count) if on is None else on.levels(count)
    if count % 2 or on is not None:
        raise ConfigError(
            f"bespoke-rk2 calls the network twice a step and places its own midpoints; give an "
            f"even number of calls, got {count}, and no grid"
        )
    return even_levels(problem.schedule, count // 2)


def _d_ode(problem: Problem, levels: tuple[Level, ...]) -> tuple[Grid, float, float]:
    factor = max(1, round(problem.settings.teacher_steps / (len(levels) - 1)))
    fine = refined_levels(problem.schedule, levels, factor)
    targets = teacher_states(problem.denoise, problem.sample, fine)[::factor]
    fit = fit_d_ode(problem.denoise, problem.sample, levels, targets)
    return grid_of(levels, fit.rows), fit.error, fit.plain_error


def _bespoke(
    problem: Problem, method: Method, levels: tuple[Level, ...], num_rounds: int
) -> tuple[Grid, float, float]:
    target = teacher_states(problem.denoise, problem.sample, problem.teacher_levels)[-1]
    fit = bespoke.fit_bespoke(
        problem.denoise,
        problem.sample,
        problem.schedule,
        levels,
        target,
        method,
        num_rounds=num_rounds,
    )
    return fit.grid, fit.error, fit.plain_error


def _finished(
    problem: Problem,
    objective: str,
    grids: tuple[Grid, ...],
    errors: dict[int, tuple[float, float]],
) -> FewStepRecipe:
    settings = asdict(problem.settings)
    digest = hashlib.sha256(json.dumps([objective, settings], sort_keys=True).encode()).hexdigest()
    scores = {}
    for count, (error, plain) in errors.items():
        scores |= {f"mse_{count}_calls": error, f"mse_{count}_calls_plain": plain}
    provenance = Provenance(
        objective=(
            f"{objective}, training-free: {problem.settings.teacher_steps}-step teacher, "
            f"{len(problem.settings.prompts)} pictures, seed {problem.settings.seed}"
        ),
        teacher=f"{problem.name}, guidance {problem.guidance.scale:g}",
        config_hash=digest,
        scores=scores,
        source=SOURCES[objective],
        created_by=f"fewstep {fewstep.__version__}",
    )
    return FewStepRecipe(
        base=problem.base,
        grids=grids,
        default_steps=grids[-1].num_steps,
        guidance=problem.guidance,
        provenance=provenance,
    )
