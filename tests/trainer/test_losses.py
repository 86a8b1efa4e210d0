"""Distribution matching against closed forms: analytic Gaussians and mixtures."""

import pytest
import torch

from fewstep import sampling
from fewstep.errors import ShapeError
from fewstep.noise_schedule import Flow, Vp
from fewstep.toy import GaussianMixture
from fewstep.trainer import losses
from fewstep.trainer.levels import levels_at, output_weight

SCHEDULES = [Flow(), Vp()]


def mixture(shift: float = 0.0) -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [1.5, -0.5], [0.0, 2.0]], dtype=torch.float64) + shift
    return GaussianMixture(means, (0.2, 0.1, 0.3), (0.5, 0.3, 0.2))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_is_zero_when_student_and_teacher_agree(schedule: Flow | Vp) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(64, 2, 1, 1, generator=generator, dtype=torch.float64)
    levels = levels_at(schedule, torch.rand(64, generator=generator))
    sample = sampling.add_noise(x0, torch.randn(x0.shape, generator=generator), levels)
    x0_hat = mixture().denoise(sample, levels)
    scale = losses.mean_abs_scale(x0, x0_hat, 0.05)
    assert losses.score_gradient(x0, x0_hat, x0_hat, scale).abs().max() == 0.0
    health = losses.match_health(x0, x0_hat, x0_hat)
    assert health.cosine == pytest.approx(1.0, abs=1e-5)
    assert health.relative_gap == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_of_a_shifted_gaussian_has_the_closed_form(schedule: Flow | Vp) -> None:
    """Equal variance v: critic - teacher = (m_student - m) sigma^2 / (alpha^2 v + sigma^2)."""
    v, m, m_student = 0.3, 0.5, 1.25
    teacher = GaussianMixture(torch.full((1, 2), m), (v,), (1.0,))
    critic = GaussianMixture(torch.full((1, 2), m_student), (v,), (1.0,))
    generator = torch.Generator().manual_seed(1)
    x0 = m_student + v**0.5 * torch.randn(256, 2, 1, 1, generator=generator)
    levels = levels_at(schedule, 0.1 + 0.8 * torch.rand(256, generator=generator))
    sample = sampling.add_noise(x0, torch.randn(x0.shape, generator=generator), levels)
    teacher_x0, critic_x0 = teacher.denoise(sample, levels), critic.denoise(sample, levels)
    scale = losses.mean_abs_scale(x0, teacher_x0, 0.0)
    gradient = losses.score_gradient(x0, teacher_x0, critic_x0, scale)
    expected = (m_student - m) * levels.sigma**2 / (levels.alpha**2 * v + levels.sigma**2)
    torch.testing.assert_close(gradient * scale, expected.expand_as(x0), rtol=1e-3, atol=1e-3)
    assert (gradient > 0).all()  # downhill lowers a student that is too high


def test_the_surrogate_has_exactly_the_gradient_it_was_given() -> None:
    x0 = torch.randn(4, 3, 2, 2, requires_grad=True)
    gradient = torch.randn(4, 3, 2, 2)
    losses.surrogate_loss(x0, gradient).backward()
    torch.testing.assert_close(x0.grad, gradient / x0.numel())


def test_the_floor_bounds_the_gradient_at_convergence() -> None:
    x0 = torch.zeros(2, 1, 4, 4)
    scale = losses.mean_abs_scale(x0, x0 + 1e-6, 0.05)
    assert losses.score_gradient(x0, x0 + 1e-6, x0 - 1e-6, scale).abs().max() <= 2e-6 / 0.05 + 1e-9


def test_more_attraction_pulls_harder_and_more_repulsion_pushes_harder() -> None:
    x0 = torch.zeros(1, 1)
    teacher, critic, scale = x0 + 2.0, x0 - 1.0, torch.ones(1, 1)
    plain = losses.score_gradient(x0, teacher, critic, scale)
    assert plain.item() == -3.0
    assert losses.score_gradient(x0, teacher, critic, scale, attract=2.0).item() == -5.0
    assert losses.score_gradient(x0, teacher, critic, scale, repel=2.0).item() == -4.0


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="must have one shape"):
        losses.match_health(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(Flow(), "flow"), (Vp(), "epsilon"), (Vp(), "v")]
)
def test_the_critic_loss_is_the_error_of_the_networks_own_output(
    schedule: Flow | Vp, prediction: sampling.Prediction
) -> None:
    generator = torch.Generator().manual_seed(2)
    x0, guess, epsilon = (torch.randn(8, 2, 4, 4, generator=generator) for _ in range(3))
    levels = levels_at(schedule, 0.2 + 0.6 * torch.rand(8, generator=generator))
    sample = sampling.add_noise(x0, epsilon, levels)
    output = sampling.from_x0(prediction, guess, sample, levels)
    truth = sampling.from_x0(prediction, x0, sample, levels)
    expected = (output - truth).square().mean()
    loss = losses.denoising_loss(guess, x0, output_weight(prediction, levels))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


def test_the_best_critic_is_the_posterior_mean() -> None:
    """The critic loss of E[x0|x_t] is below that of any scaled or shifted guess."""
    data = mixture()
    x0 = torch.from_numpy(
        GaussianMixture(data.means.numpy(), data.variances, data.weights).sample(4096, seed=0)
    )[:, :, None, None]
    generator = torch.Generator().manual_seed(3)
    levels = levels_at(Flow(), 0.2 + 0.6 * torch.rand(4096, generator=generator))
    sample = sampling.add_noise(x0, torch.randn(x0.shape, generator=generator), levels)
    best, weight = data.denoise(sample, levels), output_weight("flow", levels)
    least = losses.denoising_loss(best, x0, weight)
    for guess in (1.1 * best, 0.9 * best, best + 0.1, best - 0.1):
        assert losses.denoising_loss(guess, x0, weight) > least


def test_the_trajectory_loss_is_relative_to_the_step() -> None:
    start, target = torch.zeros(3, 1, 2, 2), torch.full((3, 1, 2, 2), 2.0)
    assert losses.trajectory_loss(target, target, start) == 0.0
    assert losses.trajectory_loss(start, target, start) == pytest.approx(1.0)
    scaled = losses.trajectory_loss(10 * (target - 0.5), 10 * target, start)
    assert scaled == pytest.approx(losses.trajectory_loss(target - 0.5, target, start).item())
