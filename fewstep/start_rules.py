"""Where image to image starts on a trained grid: two rules, both exact about the noise they add.

Strength s means the noise at the fraction s of the schedule's time; for flow that is sigma = s.
Stock pipelines instead drop a share of the steps, which at low strengths leaves none and returns
the input unchanged, and never says what noise was added. No torch.

"snap" starts at the trained level nearest to the strength: the network only ever sees timesteps it
was distilled at, so few strengths are told apart. A few-step network is trained at those timesteps
and nowhere else, which is why this is the default.

"insert" starts exactly at the strength, one step to the next trained level, then the trained tail.
Every strength differs, but the first call is at a timestep the network may never have seen: for
models trained over a range of timesteps (LCM, TCD), not for strict ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fewstep.errors import PipelineError
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_checks import expert_at
from fewstep.recipe_plan import first_noise_scale
from fewstep.sampling import StepWeights, step_weights
from fewstep.trajectory import PlannedStep, signal_weight

Plan = tuple[PlannedStep, ...]
SAME = 1e-6
"""Sigmas this near are one level."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where to begin.

    Attributes:
        plan: The steps; those before `index` are not taken.
        index: The first step that is.
    """

    plan: Plan
    index: int


def snap_start(recipe: FewStepRecipe, plan: Plan, strength: float) -> Start:
    """Begin at the trained level whose timestep is nearest; the grid stays as it is.

    Args:
        recipe: Gives the schedule.
        plan: The whole grid in use, already shifted.
        strength: 0 to 1; of two equally near levels the noisier is taken.

    Returns:
        The plan (as it is, but for noise correction) and an index; there is always at least one
        step to take.

    Raises:
        PipelineError: The strength is not between 0 and 1, or samples grow from step to step.
    """
    wanted = _wanted_timestep(recipe, plan, strength)
    # Of the schedule, not what the network is told: NitroSD's clock runs at half speed.
    schedule = recipe.base.schedule.build()
    grid = [schedule.timestep_of_sigma(step.level.sigma) for step in plan]
    resolution = 1e-6 * _whole_time(recipe)
    distances = [round(abs(timestep - wanted) / resolution) for timestep in grid]
    return Start(_from_a_picture(recipe, plan), distances.index(min(distances)))


def insert_start(recipe: FewStepRecipe, plan: Plan, strength: float) -> Start:
    """Begin exactly at the strength's level, then keep the trained levels below it.

    A strength at or above the grid's first level begins there: no more noise than was trained.

    Args:
        recipe: Gives the schedule and the step rule.
        plan: The whole grid in use, already shifted.
        strength: Above 0, up to 1.

    Returns:
        A plan that begins with the inserted step, and index 0; one that is on a trained level
        already is the trained plan.

    Raises:
        PipelineError: The strength adds no noise or is out of range, or the grid has a fitted
            solver, a clock of its own or growing samples, which are only known at its own levels.
    """
    wanted = _wanted_timestep(recipe, plan, strength)
    schedule = recipe.base.schedule.build()
    now = schedule.level(min(wanted, schedule.timestep_of_sigma(1.0)))
    end = plan[-1].following
    if now.sigma <= end.sigma:
        raise PipelineError(
            f"strength {strength:g} is no more noise than this grid ends at (sigma "
            f"{end.sigma:g}), so there is no step to take; pass a greater strength"
        )
    above = [step for step in plan if step.level.sigma >= now.sigma - SAME]
    if not above or above[-1].level.sigma <= now.sigma + SAME:
        return Start(_from_a_picture(recipe, plan), max(len(above) - 1, 0))
    _check_insertable(recipe, plan)
    tail = plan[len(above) :]
    following = tail[0].level if tail else end
    via = schedule.via(following, recipe.sampler.stochasticity)
    weights = step_weights(now, following, via)
    inserted = PlannedStep(
        level=now,
        reading=now,
        following=following,
        weights=weights,
        plain=weights,
        signal=signal_weight(following, via),
        clip_x0=recipe.sampler.clip_x0,
        expert=expert_at(recipe.experts, now.sigma) if recipe.experts else None,
    )
    return Start((inserted, *tail), 0)


StartRule = Callable[[FewStepRecipe, Plan, float], Start]
START_RULES: dict[str, StartRule] = {"snap": snap_start, "insert": insert_start}
DEFAULT_START_RULE = "snap"


def start_rule(name: str) -> StartRule:
    """The rule of a name.

    Raises:
        PipelineError: There is no such rule.
    """
    if name not in START_RULES:
        raise PipelineError(
            f"strength_rule {name!r} is unknown; use {' or '.join(map(repr, START_RULES))}"
        )
    return START_RULES[name]


def _from_a_picture(recipe: FewStepRecipe, plan: Plan) -> Plan:
    """Noise correction takes the first sample for noise alone; here there is a picture in it."""
    first = plan[0]
    if not recipe.sampler.noise_correction or first.following.sigma == 0.0:
        return plan
    noise = first.plain.sample * first_noise_scale(recipe, first.level) / first.reading.sigma
    signal = first.plain.x0 - noise * first.reading.alpha
    weights = StepWeights(noise, signal, first.plain.noise)
    return (replace(first, weights=weights, plain=weights), *plan[1:])


def _wanted_timestep(recipe: FewStepRecipe, plan: Plan, strength: float) -> float:
    if not 0.0 <= strength <= 1.0:
        raise PipelineError(f"strength must be 0 to 1, got {strength:g}")
    if plan[0].size != 1.0:
        raise PipelineError(
            "this recipe's samples grow from step to step, so there is no picture of the first "
            "size to start from; use it for text to image"
        )
    return strength * _whole_time(recipe)


def _whole_time(recipe: FewStepRecipe) -> float:
    is_trigflow = recipe.base.schedule.kind == "trigflow"
    return math.pi / 2 if is_trigflow else recipe.base.schedule.num_train_timesteps


def _check_insertable(recipe: FewStepRecipe, plan: Plan) -> None:
    grid = recipe.grid(len(plan))
    for values, what in (
        (grid.solver, "a fitted solver"),
        (grid.clock, "a clock of its own"),
        (grid.stops, "stops of its own"),
    ):
        if values:
            raise PipelineError(
                f"this recipe's grid has {what}, which is only known at trained levels; "
                "use strength_rule='snap'"
            )
