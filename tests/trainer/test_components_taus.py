"""Where teacher and critic are asked: bounds of every span, densities against scipy."""

import pytest
import torch
from scipy import stats

from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.components.grids import even_path
from fewstep.trainer.components.taus import (
    Above,
    AboveEnd,
    Below,
    BetaAnnealed,
    Density,
    Full,
    InsideStep,
    Karras,
    LogitNormal,
    Span,
    TauLaw,
    Uniform,
)

U = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)


@pytest.mark.parametrize(
    ("span", "t", "s", "bounds"),
    [
        (Full(), 0.75, 0.5, (0.0, 1.0)),
        (Above(), 0.75, 0.5, (0.75, 1.0)),
        (Above(), 1.0, 0.5, (0.0, 1.0)),
        (Below(), 0.75, 0.5, (0.0, 0.75)),
        (AboveEnd(0.02), 0.75, 0.5, (0.52, 1.0)),
        (AboveEnd(0.02), 0.25, 0.0, (0.0, 1.0)),
        (InsideStep(0.02), 0.75, 0.5, (0.52, 0.73)),
        (InsideStep(0.2), 0.75, 0.5, (0.7, 0.7)),
    ],
)
def test_spans_have_their_bounds(
    span: Span, t: float, s: float, bounds: tuple[float, float]
) -> None:
    assert span.bounds(t, s) == pytest.approx(bounds)


@pytest.mark.parametrize("schedule", [Flow(), Vp()])
@pytest.mark.parametrize("span", [Full(), Above(), Below(), AboveEnd(), InsideStep()])
def test_a_law_fills_its_span_within_its_limits(schedule: NoiseSchedule, span: Span) -> None:
    path = even_path(schedule, 4)
    for now, following in zip(path.levels, path.levels[1:], strict=False):
        law = TauLaw(span, low=0.05, high=0.9)
        positions = law.positions(U, now, following, schedule, 0.0)
        full = schedule.uniform_timesteps(1)[0]
        low, high = span.bounds(now.timestep / full, following.timestep / full)
        low = max(low, 0.05)
        assert positions.min().item() == pytest.approx(low, abs=1e-12)
        assert positions.max().item() == pytest.approx(max(low, min(high, 0.9)), abs=1e-12)


@pytest.mark.parametrize(
    ("density", "peer"),
    [
        (Uniform(), stats.uniform()),
        (LogitNormal(0.4, 1.3), stats.johnsonsb(a=-0.4 / 1.3, b=1 / 1.3)),
        (BetaAnnealed(3.0, 1.0), stats.beta(4.0, 2.0)),
    ],
)
def test_quantiles_are_those_of_scipy(density: Density, peer: stats.rv_continuous) -> None:
    ours = density.quantile(U[1:-1], 0.0, Flow())
    torch.testing.assert_close(ours, torch.from_numpy(peer.ppf(U[1:-1].numpy())))


def test_a_shifted_uniform_is_the_flow_time_shift() -> None:
    ours = Uniform(3.0).quantile(U, 0.0, Flow())
    torch.testing.assert_close(ours, 3.0 * U / (1.0 + 2.0 * U))
    assert ours[50].item() == pytest.approx(0.75)


def test_a_logit_normal_is_finite_at_its_ends() -> None:
    ours = LogitNormal(0.0, 1.0).quantile(torch.tensor([0.0, 1.0]).double(), 0.0, Flow())
    assert 0.0 < ours[0] < 0.01
    assert 0.99 < ours[1] < 1.0


@pytest.mark.parametrize("schedule", [Flow(), Vp()])
def test_karras_levels_are_edms_on_any_schedule(schedule: NoiseSchedule) -> None:
    """sigma / alpha at the quantiles is EDM's grid, as far as the table reaches."""
    low, high, rho = 0.1, 10.0, 7.0
    positions = Karras(rho, low, high).quantile(U, 0.0, schedule)
    full = schedule.uniform_timesteps(1)[0]
    levels = [schedule.level(full * float(p)) for p in positions]
    ours = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
    grid = (low ** (1 / rho) + U * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    torch.testing.assert_close(ours, grid, rtol=1e-6, atol=0.0)


def test_an_annealed_beta_becomes_uniform() -> None:
    law = BetaAnnealed(3.0, 0.0)
    torch.testing.assert_close(law.quantile(U, 0.0, Flow()), U**0.25)
    torch.testing.assert_close(law.quantile(U, 0.5, Flow()), U**0.4)
    torch.testing.assert_close(law.quantile(U, 1.0, Flow()), U)
