"""Bespoke solvers: a Runge-Kutta method in scaled samples and warped time, as rows of a recipe.

With sbar(r) = s_r y(t_r), r from 0 to 1 and h = 1/n, in the flow frame (velocity u):

    RK1:  y_{i+1} = [(s_i + h s'_i) y_i + h t'_i s_i u_i] / s_{i+1}
    RK2:  y_m     = [(s_i + h/2 s'_i) y_i + h/2 t'_i s_i u_i] / s_m
          y_{i+1} = [s_i y_i + h (s'_m y_m + t'_m s_m u_m)] / s_{i+1}

Each is linear in sample and x0 of this call and the one before: exactly a `SolverRow`.

Source:
    Shaul et al. 2023, arXiv:2310.19075, eq. 14 to 19.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.recipe import Grid, SolverRow
from fewstep.solvers.flow_frame import flow_scale, flow_time, grid_of, level_at


@dataclass(frozen=True, slots=True)
class ScaleTime:
    """A solver's numbers at its P + 1 points: n + 1 steps' ends, for RK2 with midpoints between.

    Attributes:
        times: Of the flow frame, falling strictly to 0; P + 1 values.
        time_rates: dt/dr, below 0; P values.
        scales: Above 0, the first 1; P + 1 values.
        scale_rates: ds/dr; P values.
    """

    times: tuple[float, ...]
    time_rates: tuple[float, ...]
    scales: tuple[float, ...]
    scale_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        count = len(self.times) - 1
        sizes = (len(self.time_rates), len(self.scales) - 1, len(self.scale_rates))
        if count < 1 or sizes != (count, count, count):
            raise ConfigError(
                f"a scale-time solver of {count} points needs as many rates and one scale more, "
                f"got {sizes}"
            )
        falls = all(first > second for first, second in pairwise(self.times))
        if not falls or self.times[-1] < 0.0 or min(self.scales) <= 0.0:
            raise ConfigError("a scale-time solver needs times that fall to 0 and scales above 0")


@dataclass(frozen=True, slots=True)
class Method:
    """A Runge-Kutta method.

    Attributes:
        name: For recipes and messages.
        calls: Network calls of a step.
        rows: Solver rows in the flow frame as (weight of the y before, of y, of u).
    """

    name: str
    calls: int
    rows: Callable[[ScaleTime], list[tuple[float, float, float]]]


def plain_scale_time(times: tuple[float, ...], method: Method) -> ScaleTime:
    """The solver that changes nothing: Euler, or the midpoint method, on these step ends.

    Args:
        times: n + 1 step ends in the flow frame, falling strictly.
        method: Whose points to make.
    """
    points: list[float] = []
    rates: list[float] = []
    for now, following in pairwise(times):
        for call in range(method.calls):
            points.append(now + call / method.calls * (following - now))
            rates.append((following - now) * (len(times) - 1))
    count = len(points)
    return ScaleTime((*points, times[-1]), tuple(rates), (1.0,) * (count + 1), (0.0,) * count)


def solver_grid(solver: ScaleTime, method: Method, schedule: NoiseSchedule) -> Grid:
    """A scale-time solver as a recipe's grid, on any schedule; exact up to float64.

    Args:
        solver: From a fit, or `plain_scale_time`.
        method: The same it was made for.
        schedule: Of the base.
    """
    levels = tuple(level_at(schedule, time) for time in solver.times)
    rows = []
    for index, (before, of_y, of_u) in enumerate(method.rows(solver)):
        last = levels[index - 1] if index else None
        rows.append(_row(last, levels[index], levels[index + 1], (before, of_y, of_u)))
    return grid_of(levels, tuple(rows))


def _row(
    last: Level | None, now: Level, following: Level, weights: tuple[float, float, float]
) -> SolverRow:
    """u = (y - x0) / time, y = sample / (alpha + sigma)."""
    before, of_y, of_u = weights
    out = flow_scale(following)
    of_x0 = of_u / flow_time(now)
    return SolverRow(
        sample=out * (of_y + of_x0) / flow_scale(now),
        x0=-out * of_x0,
        previous_sample=out * before / flow_scale(last) if last and before else 0.0,
    )


def _rk1_rows(solver: ScaleTime) -> list[tuple[float, float, float]]:
    h = 1.0 / len(solver.time_rates)
    rows = []
    for i, rate in enumerate(solver.time_rates):
        s, end = solver.scales[i], solver.scales[i + 1]
        rows.append((0.0, (s + h * solver.scale_rates[i]) / end, h * rate * s / end))
    return rows


def _rk2_rows(solver: ScaleTime) -> list[tuple[float, float, float]]:
    if len(solver.time_rates) % 2:
        raise ConfigError("a midpoint solver has two calls a step; give an even number of points")
    h = 2.0 / len(solver.time_rates)
    rows = []
    for i in range(0, len(solver.time_rates), 2):
        s, middle, end = solver.scales[i : i + 3]
        rate, middle_rate = solver.time_rates[i : i + 2]
        s_rate, middle_s_rate = solver.scale_rates[i : i + 2]
        half = h / 2.0
        rows.append((0.0, (s + half * s_rate) / middle, half * rate * s / middle))
        rows.append((s / end, h * middle_s_rate / end, h * middle_rate * middle / end))
    return rows


RK1 = Method("bespoke-rk1", 1, _rk1_rows)
RK2 = Method("bespoke-rk2", 2, _rk2_rows)
