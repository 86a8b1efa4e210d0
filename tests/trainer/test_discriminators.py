"""Discriminators: losses by hand, the best logit, the penalty, and a GAN that moves a Gaussian."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError
from fewstep.toy import GaussianMixture
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.critics import Critic
from fewstep.trainer.components.discriminators import (
    Discriminator,
    DiscriminatorLoss,
    GanLoss,
    GanTerm,
    Heads,
    Hinge,
    Softplus,
    density_ratio,
    pooled,
)
from fewstep.trainer.components.divergences import (
    WEIGHTS,
    Divergence,
    DivergenceWeight,
    RatioState,
    RunningMeans,
)
from fewstep.trainer.components.features import FeatureShape, NetworkFeatures, SampleFeatures
from fewstep.trainer.components.grids import FixedGrid
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.context import Setting
from fewstep.trainer.data.latent_book import LatentBook, LatentBucket
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.draws import Draws
from fewstep.trainer.methods.adversarial import GanConfig
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Stage
from tests.trainer.analytic import (
    MEAN,
    SHAPE,
    VARIANCE,
    exact_context,
    exact_path,
    exact_run,
    exact_setting,
    finish,
    moments,
)
from tests.trainer.watched import WatchedBackbone, place_student

SHIFTED = (0.0, 0.0, 0.0, 0.0, 1.0, 0.3)
"""A constant, a little more of it at noise."""
CLEAN_ONLY = TauLaw(low=0.0, high=0.0)


class LinearHead(nn.Module):
    """D(x) = <w, x> + b c, for latents as features and a pooled prompt of one number c."""

    def __init__(self, weight: float = 0.5, of_prompt: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), weight))
        self.of_prompt = of_prompt

    def forward(self, features: tuple[Tensor, ...], condition: Condition) -> Tensor:
        return features[0].flatten(1) @ self.weight + self.of_prompt * pooled(condition)[:, 0]


def judge_of(setting: Setting, head: nn.Module, **kwargs: object) -> Discriminator:
    setting.cast.modules["discriminator"] = head
    rollout = StudentRollout(FixedGrid(exact_path(1)))
    return Discriminator(SampleFeatures(), rollout, **kwargs)  # pyright: ignore[reportArgumentType]


# --- losses


def test_softplus_and_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([0.0, -3.0])
    soft = [math.log1p(math.exp(x)) for x in (-2.0, 0.5, 0.0, -3.0)]
    assert Softplus().discriminator(real, fake).item() == pytest.approx(sum(soft) / 2)
    student = (math.log(2.0) + math.log1p(math.exp(3.0))) / 2
    assert Softplus().student(fake).item() == pytest.approx(student)
    assert Hinge().discriminator(real, fake).item() == pytest.approx((0 + 1.5) / 2 + (1 + 0) / 2)
    assert Hinge().student(fake).item() == pytest.approx(1.5)


def slope_at(law: GanLoss, logit: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """d/dl of p * (loss of l as real) + q * (loss of l as fake), point by point."""
    slopes = []
    for value, real_share, fake_share in zip(logit, p, q, strict=True):
        one = value.reshape(1).clone().requires_grad_()
        nothing = torch.full((1,), -1e6, dtype=one.dtype)
        as_real = law.discriminator(one, nothing)
        as_fake = law.discriminator(-nothing, one)
        total = real_share * as_real + fake_share * as_fake
        slopes.append(torch.autograd.grad(total, one)[0])
    return torch.cat(slopes)


def test_the_best_softplus_logit_is_the_log_density_ratio() -> None:
    """Of two Gaussians, on a line of points: there and only there the loss is level."""
    real = GaussianMixture(np.array([[1.5]]), [0.25], [1.0])
    fake = GaussianMixture(np.array([[0.5]]), [0.5], [1.0])
    points = np.linspace(-1.0, 3.0, 9)[:, None]
    p, q = (torch.from_numpy(np.exp(side.log_density(points))) for side in (real, fake))
    best = (p / q).log()
    torch.testing.assert_close(
        slope_at(Softplus(), best, p, q), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert bool((slope_at(Softplus(), best + 0.3, p, q) > 0.0).all())
    assert bool((slope_at(Softplus(), best - 0.3, p, q) < 0.0).all())
    torch.testing.assert_close(density_ratio(best), (p / q).clamp(math.exp(-10), math.exp(10)))


def test_the_best_hinge_logit_is_only_its_sign() -> None:
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.3, 0.6])
    inside = torch.tensor([0.5, -0.5])
    assert slope_at(Hinge(), inside, p, q).sign().tolist() == [-1.0, 1.0]
    beyond = torch.tensor([1.5, -1.5])  # one kind alone pulls it back to the edge of the margin
    assert slope_at(Hinge(), beyond, p, q).sign().tolist() == [1.0, -1.0]


def test_ratios_are_held_between_bounds() -> None:
    assert density_ratio(torch.tensor([50.0])).item() == pytest.approx(math.exp(10.0))
    assert density_ratio(torch.tensor([-50.0])).item() == pytest.approx(math.exp(-10.0))


def test_trained_heads_find_the_log_density_ratio_of_two_gaussians() -> None:
    """N(1.5, 0.25) against N(0.5, 0.25): logit 4 x - 4."""
    torch.manual_seed(0)
    weight, bias = 2.0 * torch.randn(1, 32), torch.randn(32)

    def seen(x: Tensor) -> tuple[Tensor]:
        return (torch.tanh(x[:, None, None] * weight + bias),)

    heads = Heads((FeatureShape(32, is_tokens=True),), width=32)
    optimizer = torch.optim.Adam(heads.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    empty = Condition(torch.zeros(1024, 1, 1))
    for _ in range(300):
        real = 1.5 + 0.5 * torch.randn(1024, generator=generator)
        fake = 0.5 + 0.5 * torch.randn(1024, generator=generator)
        loss = Softplus().discriminator(heads(seen(real), empty), heads(seen(fake), empty))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = torch.linspace(0.25, 1.75, 7)
    found = heads(seen(points), Condition(torch.zeros(7, 1, 1))).detach()
    torch.testing.assert_close(found, 4.0 * points - 4.0, rtol=0, atol=0.35)


# --- heads


def test_fresh_heads_say_nothing_and_push_nobody() -> None:
    shapes = (FeatureShape(6, is_tokens=True), FeatureShape(3, is_tokens=False))
    heads = Heads(shapes, width=8, condition_width=5)
    features = (torch.randn(2, 7, 6).requires_grad_(), torch.randn(2, 3, 4, 4).requires_grad_())
    condition = Condition(torch.randn(2, 3, 5), torch.randn(2, 5))
    logits = heads(features, condition)
    assert torch.equal(logits, torch.zeros(2))
    slopes = torch.autograd.grad(logits.sum(), features)
    assert all(float(s.abs().max()) == 0.0 for s in slopes)


def test_a_prompt_moves_the_logit_through_the_projection_alone() -> None:
    torch.manual_seed(0)
    heads = Heads((FeatureShape(6, is_tokens=True),), width=8, condition_width=5)
    feature, one = (torch.randn(1, 7, 6),), torch.randn(1, 5)
    assert torch.equal(heads(feature, Condition(one[None], one)), torch.zeros(1))
    with torch.no_grad():
        heads.heads[0].of_prompt.weight.normal_()  # pyright: ignore
    first = heads(feature, Condition(one[None], one))
    doubled = heads(feature, Condition(one[None], 2.0 * one))
    torch.testing.assert_close(doubled, 2.0 * first)


def test_prompts_without_a_pooled_embedding_are_the_mean_of_their_real_tokens() -> None:
    sequence = torch.tensor([[[1.0], [3.0], [50.0]], [[2.0], [4.0], [6.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert pooled(Condition(sequence, mask=mask)).flatten().tolist() == [2.0, 4.0]
    assert pooled(Condition(sequence)).flatten().tolist() == [18.0, 4.0]
    assert pooled(Condition(sequence, torch.tensor([[7.0], [8.0]]))).flatten().tolist() == [7, 8]


# --- terms


def test_real_data_have_the_prompts_and_the_levels_of_the_fake_ones() -> None:
    """Each latent is its prompt's number; a head that sees both always finds them equal."""
    plain = exact_setting()
    numbers = torch.arange(5.0)
    book = PromptBook(
        ("",) * 5, Condition(numbers.reshape(5, 1, 1)), Condition(torch.zeros(1, 1, 1))
    )
    x0 = numbers.reshape(5, 1, 1, 1).expand(5, *SHAPE).clone()
    latents = LatentBook((LatentBucket((x0,), torch.arange(5)),))
    setting = Setting(plain.backbone, plain.cast, book, latents, (SHAPE,), plain.route)
    judge = judge_of(setting, LinearHead(0.25, of_prompt=-1.0), tau=CLEAN_ONLY)
    context = exact_context(setting, count=16, uses_data=True)
    assert context.prompt.unique().numel() > 2
    torch.testing.assert_close(judge.real_logits(context), torch.zeros(16), rtol=0, atol=1e-5)
    noisy = judge_of(setting, LinearHead(0.25), tau=TauLaw(low=0.4, high=0.4))
    context = exact_context(setting, count=16, uses_data=True)
    epsilon = context.normal("gan/real").flatten(1).mean(dim=1)
    by_hand = 0.6 * context.prompt.float() + 0.4 * epsilon
    torch.testing.assert_close(noisy.real_logits(context), by_hand, rtol=1e-5, atol=1e-5)


def test_the_penalty_is_the_squared_change_under_a_small_noise() -> None:
    """For D(x) = <w, x> at clean data: mean of (0.1 <w, n>)^2, in the mean 0.01 |w|^2."""
    setting = exact_setting()
    judge = judge_of(setting, LinearHead(0.5), tau=CLEAN_ONLY)
    context = exact_context(setting, count=4000, uses_data=True, with_grad=False)
    loss, metrics = DiscriminatorLoss(judge, weight=1.0, r1=3.0).loss(context, Role.CRITIC)
    noise = context.normal("gan/disturbed").flatten(1)
    by_hand = (0.1 * 0.5 * noise.sum(dim=1)).square().mean().item()
    assert metrics["loss/discriminator_r1"] == pytest.approx(by_hand, rel=1e-4)
    assert by_hand == pytest.approx(0.01 * 4 * 0.25, rel=0.1)
    plain = metrics["loss/discriminator"]
    assert loss.item() == pytest.approx(plain + 3.0 * by_hand, rel=1e-5)


def test_accuracy_counts_both_kinds() -> None:
    setting = exact_setting()
    judge = judge_of(setting, LinearHead(0.0), tau=CLEAN_ONLY)
    context = exact_context(setting, count=8, uses_data=True, with_grad=False)
    _, metrics = DiscriminatorLoss(judge).loss(context, Role.CRITIC)
    assert metrics["health/discriminator_accuracy"] == 0.0  # logit 0 is right about nobody
    assert metrics["loss/discriminator"] == pytest.approx(2.0 * math.log(2.0))


def test_the_students_gradient_is_the_heads_slope_at_its_own_samples() -> None:
    """softplus(-D) with D = <w, alpha x0 + sigma e>: slope -alpha sigmoid(-D) w / B in x0."""
    setting = exact_setting()
    judge = judge_of(setting, LinearHead(0.5), tau=TauLaw(low=0.3, high=0.3))
    context = exact_context(setting, count=8, uses_data=True)
    loss, _ = GanTerm(judge).loss(context)
    x0 = context.rolled(judge.rollout).x0
    (slope,) = torch.autograd.grad(loss, x0, retain_graph=True)
    logits = judge.fake_logits(context)
    by_hand = -0.7 * torch.sigmoid(-logits)[:, None, None, None] * 0.5 / 8
    torch.testing.assert_close(slope, by_hand.expand_as(slope), rtol=1e-5, atol=1e-7)


def test_logits_are_made_once_for_a_term_and_a_weight() -> None:
    setting = exact_setting()
    judge = judge_of(setting, LinearHead(), tau=TauLaw(), name="dm")
    context = exact_context(setting, uses_data=True)
    assert judge.fake_logits(context) is judge.fake_logits(context)


def test_the_settings_become_delay_and_ramp() -> None:
    judge = judge_of(exact_setting(), LinearHead())
    part = GanConfig(weight=2.0, delay=0.2, ramp=0.4).term(judge)
    assert [part.weight_at(p) for p in (0.1, 0.4, 0.8)] == pytest.approx([0.0, 1.0, 2.0])
    with pytest.raises(ConfigError, match="gan.tau-min must be 0 to 0.2, got 0.5"):
        GanConfig(tau_min=0.5, tau_max=0.2)


@dataclass(frozen=True, kw_only=True)
class GanAlone(Method):
    """A student that has nothing but a discriminator to learn from."""

    facts: ClassVar[MethodFacts] = MethodFacts("gan-alone", "", "", "", 1, "", "")
    gan: GanConfig = GanConfig(
        weight=1.0, discriminator_weight=1.0, features="teacher", width=32, r1=1.0
    )

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        rollout = StudentRollout(frame.grid)
        judge = self.gan.judge(frame, rollout)
        critic = Critic(
            rollout,
            learning_rate=5e-3,
            warmup=50,
            extras=(self.gan.extra(judge),),
            modules=("discriminator",),
            trains=False,
        )
        return (
            Stage(
                name="gan",
                num_steps=100,
                terms=(self.gan.term(judge),),
                learning_rate=2e-2,
                betas=(0.0, 0.99),
                critic=critic,
                uses_data=True,
            ),
        )

    def modules(self, frame: Frame) -> dict[str, nn.Module]:
        return self.gan.modules(frame)


def test_a_discriminator_alone_moves_a_student_to_the_data() -> None:
    """The student starts 1 away from the data's mean; no score is ever asked."""
    run = exact_run(GanAlone(), backbone=WatchedBackbone(), batch_size=128)
    place_student(run.setting, -1.0, SHIFTED)
    run.setting.cast.copy(Role.AVERAGE, Role.STUDENT)
    assert abs(moments(run)[0] - MEAN) > 0.9
    finish(run)
    mean, _ = moments(run)
    assert abs(mean - MEAN) < 0.15
    assert run.backbone.evaluations["critic"] == 0  # its features are the teacher's


# --- divergences

GENERATORS: dict[Divergence, tuple[object, float]] = {
    "rkl": (lambda r: -r.log(), 1.0),
    "kl": (lambda r: r * r.log(), 1.0),
    "js": (lambda r: r * r.log() - (r + 1.0) * ((r + 1.0) / 2.0).log(), 1.0),
    "softened-rkl": (lambda r: (r + 1.0) * ((r + 1.0) / (2.0 * r)).log(), 1.0),
    "neyman": (lambda r: (1.0 - r).square() / r, 2.0),
    "hellinger": (lambda r: (1.0 - r.sqrt()).square(), 0.5),
    "jeffreys": (lambda r: (r - 1.0) * r.log(), 1.0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_is_r_squared_times_the_second_derivative(name: Divergence) -> None:
    f, factor = GENERATORS[name]
    r = torch.logspace(-1.0, 1.3, 9, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(f(r).sum(), r, create_graph=True)  # pyright: ignore
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(factor * WEIGHTS[name](r.detach()), r.detach().square() * second)
    at_one = f(torch.ones((), dtype=torch.float64))  # pyright: ignore
    assert float(at_one) == pytest.approx(0.0)  # f(1) = 0: a divergence


def test_weights_at_equal_densities_are_the_constant() -> None:
    one = torch.ones(1)
    found = {name: float(law(one)) for name, law in WEIGHTS.items()}
    halves = {"js", "softened-rkl"}
    assert found == {
        name: 0.5 if name in halves else 2.0 if name == "jeffreys" else 1.0 for name in WEIGHTS
    }


def test_running_means_are_those_of_earlier_updates() -> None:
    means = RunningMeans(3, keep=0.5)
    bins = torch.tensor([0, 0, 2])
    assert means.at(0, bins, 7.0).tolist() == [7.0, 7.0, 7.0]
    means.add(bins, torch.tensor([1.0, 3.0, 5.0]))
    assert means.at(0, bins, 7.0).tolist() == [7.0, 7.0, 7.0]  # still the same update
    assert means.at(1, torch.tensor([0, 1, 2]), 7.0).tolist() == [2.0, 7.0, 5.0]
    means.add(torch.tensor([0]), torch.tensor([8.0]))
    # old ones at half weight: (0.5 * 4 + 8) / (0.5 * 2 + 1)
    assert means.at(2, torch.tensor([0]), 7.0).tolist() == [5.0]


def ratio_setting(divergence: Divergence) -> tuple[Setting, ScoreDifference, DivergenceWeight]:
    from fewstep.trainer.components.targets import Guided

    setting = exact_setting()
    judge = judge_of(setting, LinearHead(1.0), tau=TauLaw(), name="dm")
    setting.cast.modules["ratio"] = RatioState(4, keep=0.9)
    weight = DivergenceWeight(divergence, judge)
    term = ScoreDifference(judge.rollout, Guided(), weights=(weight,))
    return setting, term, weight


def test_weights_do_not_depend_on_how_a_batch_is_cut() -> None:
    results: list[Tensor] = []
    for parts in (1, 4):
        setting, term, weight = ratio_setting("kl")
        for step in range(3):
            whole = Draws(0, step, 0, range(64), torch.device("cpu"))
            base = exact_context(setting, count=64, step=step, uses_data=True)
            found = []
            for draws in whole.split(parts):
                context = base.part(draws)
                question = context.question(term.rollout, term.kernel, term.tau, term.name)
                found.append(weight.of(context, question)[0])
        results.append(torch.cat(found))  # pyright: ignore[reportPossiblyUnboundVariable]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert results[0].std() > 0.1


def test_weights_have_mean_one_and_follow_the_ratio() -> None:
    setting, term, weight = ratio_setting("kl")
    averages = []
    for step in range(60):
        context = exact_context(setting, count=256, step=step, uses_data=True)
        question = context.question(term.rollout, term.kernel, term.tau, term.name)
        attract, repel = weight.of(context, question)
        assert attract is repel
        averages.append(attract.mean().item())
    assert np.mean(averages[20:]) == pytest.approx(1.0, abs=0.1)
    logits = weight.discriminator.fake_logits(context).detach()  # pyright: ignore
    assert np.corrcoef(logits.numpy(), attract.numpy())[0, 1] > 0.3  # pyright: ignore


def test_reverse_kl_is_plain_distribution_matching() -> None:
    setting, term, _ = ratio_setting("rkl")
    plain = ScoreDifference(term.rollout, term.target)
    for step in range(2):
        losses = [
            part.loss(exact_context(setting, step=step, uses_data=True))[0].item()
            for part in (term, plain)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # pyright: ignore


def test_features_of_the_critic_are_asked_as_the_critic() -> None:
    run = exact_run(GanAlone(gan=GanConfig(features="critic", width=4)), backbone=WatchedBackbone())
    context = run.contexts(1, with_grad=False)[0]
    judge = run.stage.critic.extras[0].discriminator  # pyright: ignore
    assert judge.source == NetworkFeatures(("seen",), Role.CRITIC)
    judge.fake_logits(context)
    assert run.backbone.evaluations["critic"] == 256
    assert VARIANCE == 0.25
    assert Weighted(GanTerm(judge)).weight == 1.0
