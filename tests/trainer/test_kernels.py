"""Kernels and noise laws against the exact Gaussian: what a critic must predict, and where."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import CLEAN, Flow, Level, NoiseSchedule, Vp
from fewstep.trainer.components.grids import StudentPath, even_path
from fewstep.trainer.components.kernels import (
    Interval,
    Kernel,
    Noised,
    OwnPrediction,
    Renoise,
    Shared,
    transition_score_x0,
)
from fewstep.trainer.components.rollouts import Rolled
from fewstep.trainer.components.taus import (
    AboveEnd,
    BetaAnnealed,
    InsideStep,
    TauLaw,
    Uniform,
)
from fewstep.trainer.levels import Levels, levels_at

SCHEDULES: list[NoiseSchedule] = [Flow(), Vp()]
MEAN, VARIANCE = 0.7, 0.3
COUNT = 200_000


def normal(seed: int, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, 1, 1, 1), generator=generator, dtype=torch.float64)


def rolled_at(schedule: NoiseSchedule, s: Level, x0: Tensor, noise: Tensor) -> Rolled:
    """A student whose step ends at `s` with samples of exactly N(MEAN, VARIANCE) noised to it."""
    first = even_path(schedule, 1).levels[0]
    path = StudentPath((first, s), schedule, 0.0)
    return Rolled(noise, x0, sampling.add_noise(x0, noise, s), 0, path)


def middle(schedule: NoiseSchedule) -> Level:
    return even_path(schedule, 2).levels[1]


def noised_at(kernel: Kernel, rolled: Rolled, position: float, seed: int = 9) -> Noised:
    positions = torch.full((len(rolled.x0),), position, dtype=torch.float64)
    return kernel.noised(rolled, positions, normal(seed, len(rolled.x0)), rolled.path.schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("position", [0.6, 0.75, 0.9])
def test_the_interval_target_has_the_exact_posterior_mean(
    schedule: NoiseSchedule, position: float
) -> None:
    """E[x0* | x_tau] = m + alpha v / (alpha^2 v + sigma^2) (x_tau - alpha m): slope and offset."""
    x0 = MEAN + VARIANCE**0.5 * normal(1)
    rolled = rolled_at(schedule, middle(schedule), x0, normal(2))
    noised = noised_at(Interval(), rolled, position)
    target = Interval().critic_x0(rolled, noised)
    alpha, sigma = noised.levels.alpha[0].item(), noised.levels.sigma[0].item()
    sample = noised.sample
    slope = ((target - target.mean()) * (sample - sample.mean())).mean() / sample.var()
    assert slope.item() == pytest.approx(
        alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2), abs=0.02
    )
    assert target.mean().item() == pytest.approx(MEAN, abs=0.02)
    # not only on a line: the residual is uncorrelated with the square too
    residual = target - target.mean() - slope * (sample - sample.mean())
    assert (residual * (sample - sample.mean()).square()).mean().abs() < 0.03


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_interval_targets_covariance_is_analytic(schedule: NoiseSchedule) -> None:
    """Cov(x0*, x_tau) = a Var(x_s) / alpha_s - pull b = alpha v, without sampling."""
    s = middle(schedule)
    rolled = rolled_at(schedule, s, normal(1, 4), normal(2, 4))
    noised = noised_at(Interval(), rolled, 0.8)
    alpha, b = noised.levels.alpha.double(), noised.transition.double()
    pull = alpha * s.sigma**2 / (s.alpha**2 * b)
    a = alpha / s.alpha
    covariance = a * (s.alpha**2 * VARIANCE + s.sigma**2) / s.alpha - pull * b
    torch.testing.assert_close(covariance, alpha * VARIANCE, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_interval_target_is_tweedies_x0_of_the_transition(schedule: NoiseSchedule) -> None:
    rolled = rolled_at(schedule, middle(schedule), normal(1, 64), normal(2, 64))
    for position in (0.55, 0.8, 0.95):
        noised = noised_at(Interval(), rolled, position)
        target = Interval().critic_x0(rolled, noised)
        torch.testing.assert_close(target, transition_score_x0(noised), rtol=1e-4, atol=1e-4)


def test_in_flow_it_is_phased_dmds_velocity_target() -> None:
    """v* = (t + (1 - t) s^2 / (1 - s)^2) / sigma_ts epsilon - x_s / (1 - s)."""
    schedule = Flow()
    rolled = rolled_at(schedule, middle(schedule), normal(1, 64), normal(2, 64))
    noised = noised_at(Interval(), rolled, 0.8)
    target = Interval().critic_x0(rolled, noised)
    velocity = sampling.from_x0("flow", target, noised.sample, noised.levels)
    s, t = rolled.following.sigma, 0.8
    width = (t**2 - ((1 - t) / (1 - s) * s) ** 2) ** 0.5
    factor = (t + (1 - t) * s**2 / (1 - s) ** 2) / width
    expected = factor * noised.epsilon - rolled.end / (1 - s)
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_that_ends_at_clean_data_makes_the_interval_plain_renoising(
    schedule: NoiseSchedule,
) -> None:
    rolled = rolled_at(schedule, CLEAN, normal(1, 64).float(), normal(2, 64).float())
    for position in (0.05, 0.5, 0.98):
        interval = noised_at(Interval(), rolled, position)
        plain = noised_at(Renoise(), rolled, position)
        assert torch.equal(interval.sample, plain.sample)
        assert torch.equal(interval.transition, plain.transition)
        ours, theirs = Interval().critic_x0(rolled, interval), Renoise().critic_x0(rolled, plain)
        assert torch.equal(ours, theirs)


def slope_of(kernel: Kernel, rolled: Rolled, position: float) -> float:
    """Least squares: how the critic's target depends on the sample it is asked at."""
    noised = noised_at(kernel, rolled, position)
    centred = noised.sample - noised.sample.mean()
    return float((kernel.critic_x0(rolled, noised) * centred).mean() / noised.sample.var())


def test_the_students_own_prediction_is_a_right_target_only_without_carried_noise() -> None:
    """Tweedie of x_tau ~ N(., V): slope (1 - sigma^2 / V) / alpha; V differs in the two cases."""
    s, noise = middle(Flow()), normal(2)
    alpha, sigma = 0.2, 0.8
    width = (sigma**2 - (alpha / s.alpha * s.sigma) ** 2) ** 0.5
    fresh = rolled_at(Flow(), s, MEAN + VARIANCE**0.5 * normal(1), noise)
    carried = rolled_at(Flow(), s, MEAN + VARIANCE**0.5 * noise, noise)
    at_s = {
        "fresh": s.alpha**2 * VARIANCE + s.sigma**2,
        "carried": (s.alpha * VARIANCE**0.5 + s.sigma) ** 2,
    }
    exact = {
        k: (1.0 - sigma**2 / ((alpha / s.alpha) ** 2 * v + width**2)) / alpha
        for k, v in at_s.items()
    }
    own = OwnPrediction(Interval())
    assert slope_of(Interval(), fresh, sigma) == pytest.approx(exact["fresh"], abs=0.02)
    assert slope_of(own, fresh, sigma) == pytest.approx(exact["fresh"], abs=0.02)
    assert slope_of(Interval(), carried, sigma) == pytest.approx(exact["carried"], abs=0.02)
    assert abs(slope_of(own, carried, sigma) - exact["carried"]) > 0.1


def test_positions_below_the_steps_end_are_lifted_above_it() -> None:
    rolled = rolled_at(Flow(), middle(Flow()), normal(1, 8), normal(2, 8))
    noised = noised_at(Interval(margin=0.05), rolled, 0.1)
    torch.testing.assert_close(noised.levels.sigma.flatten(), torch.full((8,), 0.55))


def test_shared_asks_at_the_students_own_next_sample() -> None:
    x0, noise = normal(1, 16), normal(2, 16)
    rolled = rolled_at(Flow(), middle(Flow()), x0, noise)
    noised = noised_at(Shared(), rolled, 0.9)
    assert noised.sample is rolled.end
    assert (noised.levels.sigma == 0.5).all()
    torch.testing.assert_close(noised.epsilon, noise)
    clean = rolled_at(Flow(), CLEAN, x0, noise)
    plain = noised_at(Renoise(), clean, 0.9)
    assert torch.equal(noised_at(Shared(), clean, 0.9).sample, plain.sample)


@pytest.mark.parametrize("kernel", [Renoise(), Interval(), OwnPrediction(Interval()), Shared()])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_noised_sample_carries_the_students_gradient(
    kernel: Kernel, schedule: NoiseSchedule
) -> None:
    s = middle(schedule)
    x0 = normal(1, 4).float().requires_grad_()
    noise = normal(2, 4).float()
    rolled = dataclasses.replace(
        rolled_at(schedule, s, x0, noise), end=sampling.add_noise(x0, noise, s)
    )
    noised_at(kernel, rolled, 0.8).sample.sum().backward()
    assert x0.grad is not None
    assert bool((x0.grad > 0).all())


def positions(law: TauLaw, now: float, following: float, progress: float = 0.0) -> Tensor:
    flow = Flow()
    u = torch.linspace(0.0, 1.0 - 1e-6, 1001)
    ends = [flow.level(1000.0 * p) for p in (now, following)]
    return law.positions(u, ends[0], ends[1], flow, progress)


def test_spans_keep_to_their_part_of_the_clock() -> None:
    above = positions(TauLaw(span=AboveEnd(0.02)), 0.75, 0.5)
    assert above.min() == pytest.approx(0.52)
    assert above.max() == pytest.approx(0.98, abs=1e-3)
    inside = positions(TauLaw(span=InsideStep(0.02)), 0.75, 0.5)
    assert inside.min() == pytest.approx(0.52)
    assert inside.max() == pytest.approx(0.73, abs=1e-3)
    last = positions(TauLaw(span=AboveEnd(0.02)), 0.25, 0.0)
    assert last.min() == pytest.approx(0.02)


def test_the_annealed_density_starts_at_high_noise_and_ends_uniform() -> None:
    """Beta(4, 1) has mean 4/5; at the end of the stage it is uniform."""
    law = TauLaw(density=BetaAnnealed(3.0, 0.0), low=0.0, high=1.0)
    assert positions(law, 1.0, 0.0, 0.0).mean() == pytest.approx(0.8, abs=1e-3)
    assert positions(law, 1.0, 0.0, 0.5).mean() == pytest.approx(2.5 / 3.5, abs=1e-3)
    plain = positions(TauLaw(density=Uniform(), low=0.0, high=1.0), 1.0, 0.0)
    torch.testing.assert_close(positions(law, 1.0, 0.0, 1.0), plain, rtol=1e-9, atol=1e-9)


def test_levels_of_positions_are_on_the_schedule() -> None:
    for schedule in SCHEDULES:
        levels: Levels = levels_at(schedule, torch.tensor([0.1, 0.5, 0.9]))
        timesteps = levels.timestep.tolist()
        expected = [schedule.sigma_of_timestep(t) for t in timesteps]
        assert levels.sigma.flatten().tolist() == pytest.approx(expected, abs=1e-6)
