"""fewstep/toy.py: the analytic teacher agrees with calculus, torch and its own samples."""

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fewstep.errors import ConfigError
from fewstep.noise_schedule import CLEAN, Flow, Level, TrigFlow, Vp
from fewstep.toy import GaussianMixture

MEANS = np.array([[-1.0, 0.5], [2.0, -1.0], [0.0, 3.0]])
VARIANCES = np.array([0.2, 1.0, 0.05])
WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE = GaussianMixture(MEANS, VARIANCES, WEIGHTS, labels=(0, 0, 1))
LEVELS = [
    Vp().level(249.0),
    Vp().level(999.0),
    Flow().level(625.0),
    TrigFlow().level(1.3),
    Level(0.5, 0.8, 0.05),
]


def noisy(level: Level, count: int = 32) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal((count, 2))
    return level.alpha * MIXTURE.sample(count, seed=0) + level.sigma * noise


def torch_mixture() -> GaussianMixture:
    means, variances, weights = (torch.from_numpy(a) for a in (MEANS, VARIANCES, WEIGHTS))
    return GaussianMixture(means, variances, weights, labels=(0, 0, 1))


def torch_log_density(sample: torch.Tensor, level: Level) -> torch.Tensor:
    """An independent oracle: torch's own mixture distribution."""
    spread = torch.from_numpy(level.alpha**2 * VARIANCES + level.sigma**2)
    parts = Normal(level.alpha * torch.from_numpy(MEANS), spread.sqrt()[:, None].expand(3, 2))
    mixing = Categorical(torch.from_numpy(WEIGHTS))
    return MixtureSameFamily(mixing, Independent(parts, 1)).log_prob(sample)


@pytest.mark.parametrize("level", LEVELS)
def test_log_density_is_the_one_of_torchs_mixture(level: Level) -> None:
    sample = noisy(level)
    expected = torch_log_density(torch.from_numpy(sample), level).numpy()
    np.testing.assert_allclose(MIXTURE.log_density(sample, level), expected, rtol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_score_is_the_gradient_of_the_log_density(level: Level) -> None:
    sample = torch.from_numpy(noisy(level)).requires_grad_()
    (gradient,) = torch.autograd.grad(torch_log_density(sample, level).sum(), sample)
    score = MIXTURE.score(sample.detach().numpy(), level)
    np.testing.assert_allclose(score, gradient.numpy(), rtol=1e-9, atol=1e-9)


def test_score_is_the_finite_difference_of_our_own_log_density() -> None:
    level, width = Flow().level(500.0), 1e-5
    sample = noisy(level)
    score = MIXTURE.score(sample, level)
    for axis in range(2):
        side = np.eye(2)[axis] * width
        rise = MIXTURE.log_density(sample + side, level) - MIXTURE.log_density(sample - side, level)
        np.testing.assert_allclose(score[:, axis], rise / (2 * width), atol=1e-7)


@pytest.mark.parametrize("dimensions", [1, 3, 16])
def test_score_is_right_in_any_dimension(dimensions: int) -> None:
    """Components of unequal width differ in their normaliser, which depends on the dimension."""
    generator = np.random.default_rng(7)
    means = 0.5 * generator.standard_normal((3, dimensions))
    mixture = GaussianMixture(means, VARIANCES, WEIGHTS)
    level, width = Flow().level(400.0), 1e-5
    sample = generator.standard_normal((8, dimensions))
    side = generator.standard_normal(dimensions)
    ends = [mixture.log_density(sample + s * width * side, level) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * width)
    np.testing.assert_allclose(mixture.score(sample, level) @ side, slope, rtol=1e-5, atol=1e-6)


def test_one_gaussian_has_the_textbook_posterior_mean() -> None:
    level = Level(1.0, 0.6, 0.8)
    sample = np.linspace(-3, 3, 7)[:, None]
    gain = 0.6 * 0.25 / (0.36 * 0.25 + 0.64)
    x0 = GaussianMixture(np.array([[1.5]]), [0.25], [1.0]).denoise(sample, level)
    np.testing.assert_allclose(x0, 1.5 + gain * (sample - 0.6 * 1.5), rtol=1e-14)


def test_without_noise_the_sample_is_its_own_clean_data() -> None:
    sample = MIXTURE.sample(16, seed=2)
    np.testing.assert_allclose(MIXTURE.denoise(sample, CLEAN), sample, rtol=1e-14)
    almost = Flow().level(0.001)
    np.testing.assert_allclose(MIXTURE.denoise(sample, almost), sample, atol=1e-5)


def test_pure_noise_says_nothing_but_the_mean() -> None:
    sample = np.random.default_rng(3).standard_normal((16, 2))
    mean = np.broadcast_to(WEIGHTS @ MEANS, (16, 2))
    np.testing.assert_allclose(MIXTURE.denoise(sample, Flow().level(1000.0)), mean, rtol=1e-14)


def test_denoising_is_the_best_guess_on_average() -> None:
    """E[x0 | x_t] is orthogonal to functions of x_t in its error (here 1 and x_t)."""
    level = Flow().level(500.0)
    x0 = MIXTURE.sample(200_000, seed=4)
    noise = np.random.default_rng(5).standard_normal(x0.shape)
    sample = level.alpha * x0 + level.sigma * noise
    error = x0 - MIXTURE.denoise(sample, level)
    assert np.abs(error.mean(0)).max() < 0.005
    assert np.abs((error * sample).mean(0)).max() < 0.01


def test_samples_have_the_mixtures_moments() -> None:
    sample = MIXTURE.sample(200_000, seed=6)
    mean = WEIGHTS @ MEANS
    variance = WEIGHTS @ (VARIANCES[:, None] + MEANS**2) - mean**2
    np.testing.assert_allclose(sample.mean(0), mean, atol=0.02)
    np.testing.assert_allclose(sample.var(0), variance, rtol=0.02)
    np.testing.assert_array_equal(sample, MIXTURE.sample(200_000, seed=6))


def test_torch_gives_the_same_answers_with_gradients() -> None:
    level = Flow().level(700.0)
    sample = noisy(level)
    tensor = torch.from_numpy(sample).requires_grad_()
    x0 = torch_mixture().denoise(tensor, level)
    np.testing.assert_allclose(x0.detach().numpy(), MIXTURE.denoise(sample, level), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda s: torch_mixture().denoise(s, level), (tensor,))


def test_float32_images_and_one_level_per_sample() -> None:
    sample = noisy(Flow().level(500.0), count=6)
    sigmas = np.linspace(0.1, 1.0, 6)
    one_by_one = [
        MIXTURE.denoise(sample[i : i + 1], Flow().level(1000 * s, s)) for i, s in enumerate(sigmas)
    ]
    tensor = torch.from_numpy(sigmas).float()[:, None, None, None]
    mixture = GaussianMixture(torch.from_numpy(MEANS).float(), VARIANCES.tolist(), WEIGHTS.tolist())
    image = torch.from_numpy(sample).float().reshape(6, 2, 1, 1)
    x0 = mixture.denoise(image, LevelBatch(1.0 - tensor, tensor))
    assert x0.shape == image.shape
    assert x0.dtype == torch.float32
    np.testing.assert_allclose(x0.reshape(6, 2), np.concatenate(one_by_one), atol=1e-5)
    score = mixture.score(image, LevelBatch(1.0 - tensor, tensor))
    np.testing.assert_allclose(score, ((1 - tensor) * x0 - image) / tensor**2, rtol=1e-5)


class LevelBatch:
    """One alpha and sigma per sample, as a training batch has."""

    def __init__(self, alpha: torch.Tensor, sigma: torch.Tensor) -> None:
        self.alpha, self.sigma = alpha, sigma


def test_a_label_selects_its_components() -> None:
    level = Flow().level(600.0)
    sample = noisy(level, count=4)
    x0 = MIXTURE.denoise(sample, level, np.array([0, 1, 1, 0]))
    first, second = MIXTURE.only(0), MIXTURE.only(1)
    np.testing.assert_allclose(x0[[0, 3]], first.denoise(sample[[0, 3]], level))
    np.testing.assert_allclose(x0[[1, 2]], second.denoise(sample[[1, 2]], level))
    assert not np.allclose(x0, MIXTURE.denoise(sample, level))
    assert [float(w) for w in first.weights] == pytest.approx([0.625, 0.375])
    labels = torch.tensor([0, 1, 1, 0])
    same = torch_mixture().denoise(torch.from_numpy(sample), level, labels)
    np.testing.assert_allclose(same.numpy(), x0, rtol=1e-12)


def test_far_samples_do_not_overflow() -> None:
    sample = np.array([[1e4, -1e4]])
    level = Level(1.0, 0.99, 0.02)
    assert np.isfinite(MIXTURE.denoise(sample, level)).all()


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights must sum to 1, got 0.9"):
        GaussianMixture(MEANS, VARIANCES, [0.5, 0.3, 0.1])
    with pytest.raises(ConfigError, match="must be above 0"):
        GaussianMixture(MEANS, [1.0, 0.0, 1.0], WEIGHTS)
    with pytest.raises(ConfigError, match=r"equally many of each part, got \[3, 2, 3\]"):
        GaussianMixture(MEANS, [1.0, 1.0], WEIGHTS)
    with pytest.raises(ConfigError, match=r"no component has label 7; use one of \[0, 1\]"):
        MIXTURE.only(7)
