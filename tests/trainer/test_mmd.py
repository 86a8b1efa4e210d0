"""Maximum mean discrepancy: zero, sign, bias, gradients; random networks; patches of a teacher."""

import pytest
import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer.components.embedding_mmd import (
    EmbeddingMmd,
    PatchMmd,
    TokenMeans,
    TokenSets,
)
from fewstep.trainer.components.features import NetworkFeatures, as_tokens
from fewstep.trainer.components.grids import FixedGrid
from fewstep.trainer.components.mmd import (
    LinearKernel,
    MmdKernel,
    RbfKernel,
    paired_mmd,
    token_mean_distance,
)
from fewstep.trainer.components.random_networks import KINDS, random_networks
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.context import Setting
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role
from tests.trainer.analytic import (
    MEAN,
    VARIANCE,
    exact_book,
    exact_context,
    exact_latents,
    exact_path,
    exact_setting,
    learner,
)
from tests.trainer.watched import WatchedBackbone, place_student

CPU = torch.device("cpu")
SHIFTED = (0.0, 0.0, 0.0, 0.0, 1.0, 0.3)
"""A constant, a little more of it at noise."""
KERNELS = (LinearKernel(), RbfKernel())
BOTH = pytest.mark.parametrize("kernel", KERNELS, ids=["linear", "rbf"])


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


@BOTH
def test_equal_sets_are_at_distance_zero(kernel: MmdKernel) -> None:
    x = normals(0, 8, 5)
    assert paired_mmd(x, x, kernel).item() == pytest.approx(0.0, abs=1e-6)


@BOTH
def test_sets_of_one_distribution_are_at_distance_zero_in_the_mean(kernel: MmdKernel) -> None:
    """Unbiased: both signs occur, and the mean over many small sets is within its error of 0."""
    x, y = normals(0, 4000, 6, 3), normals(1, 4000, 6, 3)
    found = paired_mmd(x, y, kernel)
    assert 0.2 < (found > 0.0).float().mean() < 0.8
    assert abs(found.mean()) < 4.0 * found.std() / 4000**0.5


@BOTH
def test_shifted_sets_are_at_a_distance(kernel: MmdKernel) -> None:
    x, y = normals(0, 4000, 6, 3), normals(1, 4000, 6, 3) + 0.5
    found = paired_mmd(x, y, kernel)
    assert found.mean() > 10.0 * found.std() / 4000**0.5


def test_the_linear_kernel_is_the_squared_distance_of_means() -> None:
    """<x, y> / D: the mean over small sets is |shift|^2 / D."""
    shift = torch.tensor([0.5, -1.0, 0.0])
    x, y = normals(0, 20000, 6, 3), normals(1, 20000, 6, 3) + shift
    assert paired_mmd(x, y, LinearKernel()).mean().item() == pytest.approx(1.25 / 3, rel=0.05)


def test_only_rbf_sees_the_spread() -> None:
    x, y = normals(0, 4000, 8, 3), 2.0 * normals(1, 4000, 8, 3)
    for kernel, sees in ((LinearKernel(), False), (RbfKernel(), True)):
        found = paired_mmd(x, y, kernel)
        is_far = bool(found.mean() > 6.0 * found.std() / 4000**0.5)
        assert is_far is sees


def test_the_rbf_gram_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])
    distances = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 4.0], [9.0, 4.0, 0.0]])
    spread = distances.mean()
    by_hand = (-distances / (2.0 * 0.25 * spread)).exp()
    torch.testing.assert_close(RbfKernel((0.5,)).gram(x), by_hand)


def test_the_patch_distance_by_hand() -> None:
    fake = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    real = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    c = 0.5
    by_hand = ((1.5**2 + c * c) ** 0.5 - c) / 2  # the second channel agrees
    assert token_mean_distance(fake, real, c).item() == pytest.approx(by_hand)
    assert token_mean_distance(fake, fake).item() == 0.0
    assert TokenSets().of(fake, fake).item() == pytest.approx(0.0, abs=1e-7)
    more = torch.cat([fake, fake + 1.0], dim=1)
    assert TokenMeans(c).of(more, more - 1.0).item() == pytest.approx((1.0 + c * c) ** 0.5 - c)


def test_images_are_read_as_tokens_row_by_row() -> None:
    image = torch.arange(12.0).reshape(1, 3, 2, 2)
    assert as_tokens(image)[0].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    tokens = torch.zeros(1, 4, 3)
    assert as_tokens(tokens) is tokens


# --- random networks


def test_networks_follow_their_seed_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (random_networks(4, 3, 8, seed=s, device=CPU) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    x0 = normals(0, 2, 3, 8, 8)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a(x0), b(x0))
        assert not torch.allclose(a(x0), c(x0))
        assert not any(p.requires_grad for p in a.parameters())
    assert [type(network) for network in first] == list(KINDS)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (1, 1)])
def test_every_kind_takes_any_size_and_gives_finite_features_of_one_scale(
    size: tuple[int, int],
) -> None:
    for network in random_networks(len(KINDS), 3, 16, seed=0, device=CPU):
        features = network(normals(0, 32, 3, *size))
        assert features.shape[0] == 32
        assert features.ndim == 2
        assert 0.05 < features.square().mean().sqrt() < 10.0
        assert features.std(dim=0).mean() > 1e-3


def test_networks_see_mean_and_contrast() -> None:
    """What normalisation layers would hide."""
    x = normals(0, 64, 3, 8, 8)
    for network in random_networks(len(KINDS), 3, 16, seed=0, device=CPU):
        for changed in (x + 0.5, 1.5 * x):
            assert paired_mmd(network(changed), network(x), LinearKernel()).item() > 1e-4


# --- terms on the exact teacher


def rollout() -> StudentRollout:
    return StudentRollout(FixedGrid(exact_path(1)))


@BOTH
def test_the_embedding_loss_pulls_the_students_mean_to_the_datas(kernel: MmdKernel) -> None:
    """From the data's mean plus 1; nothing but random networks says where real data are."""
    setting = exact_setting()
    place_student(setting, 0.8, SHIFTED)
    term = EmbeddingMmd(rollout(), kernel, num_networks=4, width=16)
    student = learner(setting.cast.parameters(Role.STUDENT), 0.05, beta1=0.5)

    def mean() -> float:
        context = exact_context(setting, uses_data=True, with_grad=False)
        return context.rolled(rollout()).x0.mean().item()

    assert mean() - MEAN > 0.9
    for step in range(60):
        context = exact_context(setting, step=step, uses_data=True)
        student.update([lambda c=context: term.loss(c)], 1.0 - step / 60)
    assert abs(mean() - MEAN) < 0.15


def test_a_part_of_one_sample_has_no_pairs() -> None:
    context = exact_context(exact_setting(), count=1, uses_data=True)
    with pytest.raises(ConfigError, match="each part of a batch has 1 sample"):
        EmbeddingMmd(rollout()).loss(context)


def watched_setting() -> Setting:
    backbone = WatchedBackbone()
    cast = Cast(backbone.denoiser, backbone.own_networks)
    cast.add(Role.STUDENT, LoraPolicy(("head",), 1, 1.0), torch.Generator().manual_seed(0))
    return Setting(
        backbone,
        cast,
        exact_book(backbone),
        exact_latents(),
        (backbone.shape,),
        exact_setting().route,
    )


def test_patches_are_compared_at_one_noise_of_one_level() -> None:
    """By hand: alpha x0 + sigma e for fake and real, features of the layer, mean tokens."""
    setting = watched_setting()
    tau = TauLaw(low=0.4, high=0.4)
    term = PatchMmd(NetworkFeatures(("seen",), Role.TEACHER), rollout(), tau=tau)
    context = exact_context(setting, count=16, uses_data=True)
    loss, _ = term.loss(context)
    epsilon = context.draws.normal("epsilon/patches", context.shape)
    sigma = torch.full((16, 1, 1, 1), 0.4)
    seen = setting.backbone.denoiser.seen
    tokens = [
        seen(0.6 * x0 + 0.4 * epsilon, sigma)  # pyright: ignore
        for x0 in (context.rolled(rollout()).x0, context.real.x0)
    ]
    torch.testing.assert_close(loss, token_mean_distance(tokens[0], tokens[1]))
    (slope,) = torch.autograd.grad(loss, context.rolled(rollout()).x0)
    assert slope.abs().max() > 0.0


@pytest.mark.parametrize("distance", [TokenMeans(), TokenSets()], ids=["means", "rbf"])
def test_patches_pull_the_student_to_the_data(distance: TokenMeans | TokenSets) -> None:
    setting = watched_setting()
    place_student(setting, 0.8, SHIFTED)
    source = NetworkFeatures(("seen",), Role.TEACHER)
    term = PatchMmd(source, rollout(), distance, tau=TauLaw(low=0.02, high=0.3))
    student = learner(setting.cast.parameters(Role.STUDENT), 0.05, beta1=0.5)
    for step in range(60):
        context = exact_context(setting, step=step, uses_data=True)
        student.update([lambda c=context: term.loss(c)], 1.0 - step / 60)
    context = exact_context(setting, uses_data=True, with_grad=False)
    assert abs(context.rolled(rollout()).x0.mean().item() - MEAN) < VARIANCE
