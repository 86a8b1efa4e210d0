"""D-ODE: one number per step, fitted so that a coarse solver follows a finer one.

    x0' = x0_n + lambda_n (x0_n - x0_{n-1}),    then the plain step with x0' in place of x0_n

(`noise_direction`: the same with epsilon, for models that predict it.) Each lambda is the exact
least-squares solution over a batch; the corrected sample is what the next step starts from. The
first step has no call before it and stays plain.

Source:
    Kim et al. 2023, arXiv:2309.16421, eq. 9 to 12.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level
from fewstep.recipe import SolverRow
from fewstep.sampling import A, StepWeights, combine, step_weights
from fewstep.solvers.teacher_path import as_vector, mean_square
from fewstep.trajectory import Denoiser

Direction = Callable[[Level, Level, Level], StepWeights]
"""(level before, now, following) -> what one unit of lambda adds to the plain step."""


@dataclass(frozen=True, slots=True)
class DOdeFit:
    """Fitted steps of one grid.

    Attributes:
        lambdas: N values, the first 0.
        rows: The steps as a recipe stores them.
        error: Mean squared difference of the result to the teacher's.
        plain_error: The same of plain steps on this grid.
    """

    lambdas: tuple[float, ...]
    rows: tuple[SolverRow, ...]
    error: float
    plain_error: float


def data_direction(before: Level, now: Level, following: Level) -> StepWeights:
    """Extrapolates predicted clean data (EDM, flow and x0 models)."""
    weight = step_weights(now, following, following).x0
    return StepWeights(0.0, weight, 0.0, 0.0, -weight)


def noise_direction(before: Level, now: Level, following: Level) -> StepWeights:
    """Extrapolates predicted noise, from which clean data follows (epsilon models; alpha > 0)."""
    if before.alpha <= 0.0:
        raise ConfigError("noise cannot be extrapolated from a level of alpha 0; use clean data")
    unit = following.sigma - following.alpha * now.sigma / now.alpha
    return StepWeights(
        sample=unit / now.sigma,
        x0=-unit * now.alpha / now.sigma,
        noise=0.0,
        previous_sample=-unit / before.sigma,
        previous_x0=unit * before.alpha / before.sigma,
    )


def fit_d_ode(
    denoise: Denoiser[A],
    sample: A,
    levels: Sequence[Level],
    targets: Sequence[A],
    direction: Direction = data_direction,
) -> DOdeFit:
    """Fit the lambdas of a grid.

    Args:
        denoise: The network, guidance included.
        sample: Noise at the first level, already scaled, a batch.
        levels: The grid's N + 1 levels.
        targets: The finer solver's states at those levels (`teacher_states` on
            `refined_levels`, every C-th), N + 1.
        direction: What is extrapolated.

    Raises:
        ConfigError: Levels and targets differ in number.
    """
    if len(targets) != len(levels):
        raise ConfigError(f"got {len(targets)} targets for {len(levels)} levels; give one of each")
    plain_error = mean_square(_plain(denoise, sample, levels), targets[-1])
    lambdas: list[float] = []
    rows: list[SolverRow] = []
    previous: tuple[A, A] | None = None
    for index, (now, following) in enumerate(zip(levels, levels[1:], strict=False)):
        x0 = denoise(sample, now)
        plain = step_weights(now, following, following)
        moved = combine(plain, sample, x0, None)
        value, unit = 0.0, StepWeights(0.0, 0.0, 0.0)
        if previous is not None:
            unit = direction(levels[index - 1], now, following)
            push = combine(unit, sample, x0, None, previous)
            value = _least_squares(push, targets[index + 1] - moved)
            moved = moved + value * push
        lambdas.append(value)
        rows.append(_row(plain, unit, value))
        sample, previous = moved, (sample, x0)
    return DOdeFit(tuple(lambdas), tuple(rows), mean_square(sample, targets[-1]), plain_error)


def _least_squares(push: A, gap: A) -> float:
    along, wanted = as_vector(push), as_vector(gap)
    length = float(along @ along)
    return float(along @ wanted) / length if length > 0.0 else 0.0


def _row(plain: StepWeights, unit: StepWeights, value: float) -> SolverRow:
    return SolverRow(
        sample=plain.sample + value * unit.sample,
        x0=plain.x0 + value * unit.x0,
        previous_sample=value * unit.previous_sample,
        previous_x0=value * unit.previous_x0,
    )


def _plain(denoise: Denoiser[A], sample: A, levels: Sequence[Level]) -> A:
    for now, following in zip(levels, levels[1:], strict=False):
        x0 = denoise(sample, now)
        sample = combine(step_weights(now, following, following), sample, x0, None)
    return sample
