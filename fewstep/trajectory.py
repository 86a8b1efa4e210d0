"""A trajectory as planned steps, and the reference loop that every host must agree with.

Planning turns a grid and its step rule into plain numbers once; running it is `advance` per network
call. Works on numpy and torch arrays. `recipe_plan.plan_steps` plans a recipe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.sampling import A, StepWeights, combine, step_weights

Denoiser = Callable[[A, Level], A]
"""The boundary: a network as samplers and losses see it, (sample, level) -> predicted x0."""

Draw = Callable[[float], A]
"""A noise stream: the next standard normal draw, for a sample of this size (`PlannedStep.size`)."""

Resize = Callable[[A, float], A]
"""Clean data at another size, as a fraction of the finished one."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One network call and the step after it, as numbers.

    Attributes:
        level: Where the sample is; the timestep is what the network is told.
        reading: Where the network's output is read as clean data; `level` but for NitroSD.
        following: Where the step ends.
        weights: The step.
        plain: The step where `weights` look at a call before this one and there was none (image to
            image starts anywhere).
        signal: Weight of x0 as clean data alone, for clipping it.
        clip_x0: Clean data is clipped to plus or minus this; None does not clip.
        size: Height and width of the sample, as a fraction of the finished one.
        following_size: The same of the step's result.
        expert: Index of the expert that makes the call, None without experts.
    """

    level: Level
    reading: Level
    following: Level
    weights: StepWeights
    plain: StepWeights
    signal: float
    clip_x0: float | None = None
    size: float = 1.0
    following_size: float = 1.0
    expert: int | None = None

    @property
    def needs_noise(self) -> bool:
        """Whether the step draws from the noise stream."""
        return self.weights.noise != 0.0


def plain_steps(
    levels: Sequence[Level], schedule: NoiseSchedule, stochasticity: float = 0.0
) -> tuple[PlannedStep, ...]:
    """Full-size steps of the one step function.

    Args:
        levels: N + 1 descending levels (`levels_of`).
        schedule: Gives the intermediate level of stochastic steps.
        stochasticity: 0 to 1; see `NoiseSchedule.via`.
    """
    planned = []
    for now, following in zip(levels, levels[1:], strict=False):
        via = schedule.via(following, stochasticity)
        weights = step_weights(now, following, via)
        signal = signal_weight(following, via)
        planned.append(PlannedStep(now, now, following, weights, weights, signal))
    return tuple(planned)


def signal_weight(following: Level, via: Level) -> float:
    """Weight of clean data in a step, the noise implied by it held fixed."""
    return following.alpha if via == following else following.alpha / via.alpha * via.alpha


def advance(
    planned: PlannedStep, sample: A, x0: A, noise: A | None, previous: tuple[A, A] | None = None
) -> A:
    """One step as planned.

    Args:
        planned: The step.
        sample: The noisy sample at its level, any shape; at its size unless the size changes.
        x0: Predicted clean data, same shape, not clipped.
        noise: Standard normal, same shape; not looked at in a deterministic step.
        previous: Sample and x0 of the call before, None at the first.

    Returns:
        The sample at the next level. At sigma 0 this is exactly x0 (clipped where it says so).
    """
    is_missing = previous is None and planned.weights.needs_previous
    weights = planned.plain if is_missing else planned.weights
    moved = combine(weights, sample, x0, noise, previous)
    if planned.clip_x0 is None:
        return moved
    # The noise it moves along is the one the network meant; only the clean data is clipped.
    return moved + planned.signal * (x0.clip(-planned.clip_x0, planned.clip_x0) - x0)


def sample_trajectory(
    denoise: Denoiser[A],
    sample: A,
    steps: Sequence[PlannedStep],
    *,
    draw: Draw[A] | None = None,
    resize: Resize[A] | None = None,
) -> A:
    """Run planned steps from the first to the last.

    Args:
        denoise: The network, guidance included.
        sample: Noise at the first level, already scaled.
        steps: From `plain_steps` or `recipe_plan.plan_steps`.
        draw: Called once per step that adds noise.
        resize: Called before a step that ends at another size (it re-noises from x0 alone).

    Returns:
        The sample at the end of the last step.
    """
    previous: tuple[A, A] | None = None
    for planned in steps:
        x0 = denoise(sample, planned.reading)
        before = (sample, x0)
        if planned.following_size != planned.size and resize is not None:
            x0 = resize(x0, planned.following_size)
            sample = x0  # its weight is zero: what is re-noised does not remember the sample
        noise = draw(planned.following_size) if draw and planned.needs_noise else None
        sample, previous = advance(planned, sample, x0, noise, previous), before
    return sample
