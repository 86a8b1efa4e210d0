"""Rules that tie the parts of a recipe together: grids to the schedule, steps to experts."""

import itertools

from fewstep.errors import RecipeError
from fewstep.noise_schedule import NoiseSchedule, shift_sigma
from fewstep.recipe_grids import Grid
from fewstep.recipe_parts import Base, Expert, Guidance, Route, Sampler

SIGMA_TOLERANCE = 1e-4
"""How far a grid's sigma may be from its timestep's (diffusers' tables are float32)."""
MIN_ALPHA = 1e-6
"""Below this, x0 = (sample - sigma * epsilon) / alpha is noise divided by nothing."""


def check_grid(grid: Grid, base: Base) -> None:
    """The clock and the noise of each step must be the same point of the base's schedule."""
    name = grid.name
    schedule = base.schedule.build()
    tick = schedule.uniform_timesteps(1)[0] / 1000  # models round their clock; never by more
    for timestep, sigma in zip(grid.timesteps, grid.sigmas, strict=False):
        expected = _sigma_at(schedule, timestep, name)
        nearest = schedule.timestep_of_sigma(sigma)
        is_on_schedule = abs(schedule.sigma_of_timestep(nearest) - sigma) <= SIGMA_TOLERANCE
        is_rounded = is_on_schedule and abs(nearest - timestep) < tick
        if not is_rounded and abs(expected - sigma) > SIGMA_TOLERANCE:
            is_flow = base.schedule.kind == "flow"
            raise RecipeError(
                f"{name} pairs timestep {timestep:g} with sigma {sigma:g}, but the schedule says "
                f"{expected:g}; {'store both shifted, once' if is_flow else 'correct one of them'}"
            )
    if base.prediction == "epsilon" and schedule.alpha_of_sigma(grid.sigmas[0]) < MIN_ALPHA:
        raise RecipeError(
            f"{name} starts at sigma {grid.sigmas[0]:g}, where an epsilon prediction does not "
            "give x0; start below it"
        )


def check_steps(grid: Grid, sampler: Sampler) -> None:
    """A scale ladder re-noises at each size; a fitted solver has no other step rule beside it."""
    if len(set(grid.sizes)) > 1 and sampler.stochasticity != 1.0:
        raise RecipeError(
            f"{grid.name} changes size between steps, which needs sampler.stochasticity 1 "
            f"(fresh noise at the new size), got {sampler.stochasticity:g}"
        )
    if grid.stops and (sampler.stochasticity or grid.solver or grid.sizes):
        raise RecipeError(
            f"{grid.name} has stops, which say how stochastic each step is; write stochasticity 0, "
            "no solver and no sizes"
        )
    others = sampler.stochasticity or sampler.noise_correction or sampler.clip_x0 is not None
    if grid.solver and others:
        raise RecipeError(
            f"{grid.name} has a solver, which is deterministic as it is; write stochasticity 0, "
            "no clip_x0 and no noise_correction"
        )


def check_flow_map(base: Base, grids: tuple[Grid, ...], experts: tuple[Expert, ...]) -> None:
    """A jump by average velocity, `sample - (sigma - sigma_next) * velocity`."""
    if base.prediction != "flow":
        raise RecipeError(
            f"sampler.kind 'flow_map' needs a flow schedule and base.prediction 'flow', got "
            f"{base.prediction!r} on kind {base.schedule.kind!r}"
        )
    if experts:
        raise RecipeError("sampler.kind 'flow_map' and experts cannot be combined; leave one out")
    for grid in grids:
        if grid.clock or grid.solver or grid.stops:
            raise RecipeError(
                f"{grid.name} has a clock, a solver or stops, but with sampler.kind 'flow_map' the "
                "network itself is told where a step ends; leave them out"
            )


def check_policy(
    base: Base,
    grids: tuple[Grid, ...],
    sampler: Sampler,
    guidance: Guidance,
    *,
    others: tuple[str, ...],
) -> None:
    """A policy is followed from each level to the next, along the base's own flow.

    Args:
        base: What it was trained on.
        grids: All of them.
        sampler: With the policy.
        guidance: A policy is no velocity that two passes could be mixed of.
        others: Names of what the recipe has that knows one velocity per step only.
    """
    policy = sampler.policy
    assert policy is not None  # Sampler.__post_init__
    if base.prediction != "flow":
        raise RecipeError(
            f"sampler.kind 'policy' needs a flow schedule and base.prediction 'flow', got "
            f"{base.prediction!r} on kind {base.schedule.kind!r}"
        )
    if guidance.mode in ("cfg", "true_cfg"):
        raise RecipeError(
            f"sampler.kind 'policy' and guidance.mode {guidance.mode!r} cannot be combined; write "
            "mode none or embedded"
        )
    if others:
        raise RecipeError(
            f"sampler.kind 'policy' and {others[0]} cannot be combined; leave one out"
        )
    for grid in grids:
        if grid.clock or grid.solver or grid.stops or grid.sizes:
            raise RecipeError(
                f"{grid.name} has a clock, a solver, stops or sizes, but with sampler.kind "
                "'policy' the network says how a step goes; leave them out"
            )
        if policy.segment is not None:
            _check_segment(grid, policy.shift, policy.segment)


def _check_segment(grid: Grid, shift: float, segment: float) -> None:
    clock = [shift_sigma(sigma, 1.0 / shift) for sigma in grid.sigmas]
    for index, (now, following) in enumerate(itertools.pairwise(clock)):
        if now - following > segment + SIGMA_TOLERANCE:
            raise RecipeError(
                f"{grid.name} goes {now - following:.4g} of the policy's clock in step {index}, "
                f"but its network tells {segment:.4g} ahead (sampler.policy.segment); use more "
                "steps"
            )


def check_routes(
    routes: tuple[Route, ...], experts: tuple[Expert, ...], sampler: Sampler, guidance: Guidance
) -> None:
    """Routes are several plain students of which one serves a call."""
    if not routes:
        return
    names = [route.adapter for route in routes]
    if len(names) < 2 or len(set(names)) < len(names):
        raise RecipeError(f"routes needs two or more adapters, each named once; got {names}")
    if experts:
        raise RecipeError("routes and experts cannot be combined; leave one of them out")
    if sampler.kind != "step":
        raise RecipeError(
            f"routes and sampler.kind {sampler.kind!r} cannot be combined; leave one of them out"
        )
    if guidance.mode in ("cfg", "true_cfg"):
        raise RecipeError(
            f"routes and guidance.mode {guidance.mode!r} cannot be combined: the empty prompt of "
            "the second pass is in no group; write mode none"
        )


def check_can_shift(base: Base, grids: tuple[Grid, ...]) -> None:
    """A size-dependent shift moves a flow's sigmas, but not what was fitted to them."""
    if base.schedule.kind != "flow":
        raise RecipeError(
            f"resolution_shift needs a flow schedule, got kind {base.schedule.kind!r}; leave it out"
        )
    for grid in grids:
        for what in ("solver", "stops"):
            if getattr(grid, what):
                raise RecipeError(
                    f"{grid.name} has {what}, which a resolution_shift does not move; store the "
                    "shifted grid of one size, without resolution_shift"
                )


def _sigma_at(schedule: NoiseSchedule, timestep: float, name: str) -> float:
    try:
        return schedule.sigma_of_timestep(timestep)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error


def check_experts(experts: tuple[Expert, ...]) -> None:
    highs = [expert.sigma_high for expert in experts]
    if highs != sorted(highs, reverse=True):
        raise RecipeError(f"experts must be listed highest noise first; got sigma_high {highs}")
    for first, second in itertools.pairwise(experts):
        if first.sigma_low != second.sigma_high:
            kind = "overlap" if first.sigma_low < second.sigma_high else "leave a gap"
            raise RecipeError(
                f"experts {first.adapter!r} and {second.adapter!r} {kind}: one ends at sigma "
                f"{first.sigma_low:g}, the next starts at {second.sigma_high:g}"
            )
    if experts and (experts[0].sigma_high < 1.0 or experts[-1].sigma_low > 0.0):
        raise RecipeError(
            f"experts cover sigma {experts[0].sigma_high:g} to {experts[-1].sigma_low:g}; "
            "they must cover 1 to 0"
        )


def check_grid_experts(grid: Grid, experts: tuple[Expert, ...]) -> None:
    name = grid.name
    if len(grid.experts) != (grid.num_steps if experts else 0):
        raise RecipeError(
            f"{name} assigns {len(grid.experts)} steps to experts; wanted "
            f"{grid.num_steps if experts else '0, as there are no experts'}"
        )
    for index, (chosen, sigma) in enumerate(zip(grid.experts, grid.sigmas, strict=False)):
        expected = expert_at(experts, sigma)
        if chosen != expected:
            raise RecipeError(
                f"{name} gives step {index} (sigma {sigma:g}) to expert {chosen}, but the sigma "
                f"intervals say {expected}; make them agree"
            )


def check_all_used(experts: tuple[Expert, ...], grids: tuple[Grid, ...]) -> None:
    used = {index for grid in grids for index in grid.experts}
    for index, expert in enumerate(experts):
        if index not in used:
            raise RecipeError(
                f"expert {expert.adapter!r} serves no step of any grid; leave it out or add a step"
            )


def expert_at(experts: tuple[Expert, ...], sigma: float) -> int:
    for index, expert in enumerate(experts):
        if expert.sigma_low <= sigma:
            return index
    return len(experts) - 1
