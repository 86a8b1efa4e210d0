"""Score identities: they are one family, their gradient is the divergence's, and it flows."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError
from fewstep.heads.lorad import merged
from fewstep.toy import GaussianMixture
from fewstep.trainer.components.critics import Critic
from fewstep.trainer.components.grids import Exit, FixedGrid
from fewstep.trainer.components.real_uid import RealShares, RealUid, RealUidCritic, uid_product
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.score_identity import (
    NoNormaliser,
    PseudoHuberDistance,
    ScoreDistance,
    ScoreIdentity,
    SquaredDistance,
    identity_product,
)
from fewstep.trainer.components.signals import EpsilonVariance
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import Levels
from fewstep.trainer.methods.identity import IdentityConfig, laws_of
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.real_uid import RealUidMethod
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.sid import Sid, SidFewStep
from fewstep.trainer.methods.sim import Sim
from fewstep.trainer.methods.wadi import Wadi
from fewstep.trainer.parameters.lora import RoleLayer
from fewstep.trainer.parameters.lorad import LoradUpdate
from fewstep.trainer.roles import Role, acting_as
from tests.trainer.analytic import (
    MEAN,
    VARIANCE,
    exact_context,
    exact_path,
    exact_run,
    exact_setting,
    finish,
    moments,
)
from tests.trainer.residual import ResidualBackbone

TAU = 0.4


class Family(nn.Module):
    """Random float64 networks: a student, a teacher and a critic that see x_tau and tau."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = [nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(3)]
        self.student, self.teacher, self.critic = (part.double() for part in parts)
        self.noise, self.epsilon = torch.randn(2, 64, 4, dtype=torch.float64)

    def answers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x0, x_tau, teacher x0, critic x0)."""
        x0 = self.student(_with(self.noise, 1.0))
        sample = (1.0 - TAU) * x0 + TAU * self.epsilon
        seen = _with(sample, TAU)
        return x0, sample, self.teacher(seen), self.critic(seen)

    def gradient(self, loss: Tensor) -> Tensor:
        """Of the student's parameters, flat."""
        parameters = list(self.student.parameters())
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in found])


def _with(sample: Tensor, time: float) -> Tensor:
    return torch.cat([sample, torch.full_like(sample[:, :1], time)], 1)


def compare(one: Tensor, other: Tensor) -> tuple[float, float]:
    """(cosine, ratio of lengths)."""
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    return float(cosine), float(one.norm() / other.norm())


def test_uid_times_tau_squared_is_twice_sid_at_one_half() -> None:
    family = Family()
    x0, sample, teacher, critic = family.answers()
    target, by_teacher, by_critic = ((sample - x) / TAU for x in (x0, teacher, critic))
    uid = uid_product(target, by_teacher, by_critic, RealShares(1.0, 1.0)).mean() * TAU**2
    plain = ((by_teacher - target) ** 2 - (by_critic - target) ** 2).mean()
    torch.testing.assert_close(uid, plain * TAU**2, rtol=1e-12, atol=0.0)
    sid = identity_product(x0, teacher, critic, 0.5, SquaredDistance()).mean()
    cosine, ratio = compare(family.gradient(uid), family.gradient(sid))
    assert cosine == pytest.approx(1.0, abs=1e-12)
    assert ratio == pytest.approx(2.0, rel=1e-10)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_product_is_the_papers_and_sim_with_squares_is_sid_at_one(alpha: float) -> None:
    """SiD writes (T - F)((T - x0) - alpha (T - F)), SIM (T - F)(F - x0)."""
    family = Family()
    x0, _, teacher, critic = family.answers()
    ours = identity_product(x0, teacher, critic, alpha, SquaredDistance())
    difference = teacher - critic
    torch.testing.assert_close(ours, difference * ((teacher - x0) - alpha * difference))
    if alpha == 1.0:
        torch.testing.assert_close(ours, difference * (critic - x0), rtol=1e-12, atol=0.0)
        sim = difference * (critic - x0)
        one, other = family.gradient(ours.mean()), family.gradient(sim.mean())
        assert compare(one, other) == (pytest.approx(1.0, abs=1e-12), pytest.approx(1.0))


def one_dimensional(
    distance: ScoreDistance, alpha: float, mean: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor]:
    """(SiD's loss with the critic frozen, the divergence it stands for) of N(mean, spread^2).

    The divergence compares scores at samples that are held fixed, as SIM defines it.

    The expectation is over a grid of quantiles of both noises: exact to 1e-3.
    """
    even = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    z, epsilon = torch.meshgrid(*[torch.special.ndtri(even)] * 2, indexing="ij")
    alpha_tau = 1.0 - TAU

    def posterior(sample: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return m + alpha_tau * s**2 / (alpha_tau**2 * s**2 + TAU**2) * (sample - alpha_tau * m)

    x0 = mean + spread * z
    sample = alpha_tau * x0 + TAU * epsilon
    sample, x0 = sample.reshape(-1, 1), x0.reshape(-1, 1)

    def teacher(sample: Tensor) -> Tensor:
        return posterior(sample, torch.tensor(MEAN), torch.tensor(VARIANCE**0.5))

    frozen = posterior(sample, mean.detach(), spread.detach())
    loss = identity_product(x0, teacher(sample), frozen, alpha, distance).mean()
    there = sample.detach()
    difference = teacher(there) - posterior(there, mean, spread)
    if isinstance(distance, PseudoHuberDistance):
        return loss, ((difference**2 + distance.c**2).sqrt() - distance.c).mean()
    return loss, 0.5 * difference.square().mean()


@pytest.mark.parametrize("distance", [SquaredDistance(), PseudoHuberDistance(0.1)])
def test_the_gradient_is_that_of_the_divergence_with_a_perfect_critic(
    distance: ScoreDistance,
) -> None:
    """The score-gradient theorem on Gaussians: no derivative of the critic is needed."""
    mean = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    spread = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss, divergence = one_dimensional(distance, 1.0, mean, spread)
    ours = torch.autograd.grad(loss, [mean, spread], retain_graph=True)
    exact = torch.autograd.grad(divergence, [mean, spread])
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-4)
    if isinstance(distance, SquaredDistance):  # at equal spreads: -(M - m)(1 - a alpha)^2
        start = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        same = torch.tensor(VARIANCE**0.5, dtype=torch.float64)
        loss, _ = one_dimensional(distance, 1.0, start, same)
        (found,) = torch.autograd.grad(loss, [start])
        left = TAU**2 / ((1.0 - TAU) ** 2 * VARIANCE + TAU**2)
        assert float(found) == pytest.approx(-(MEAN - 0.8) * left**2, rel=1e-3)


def perturbed_context(**options: bool) -> StepContext:
    """The exact teacher with a student and a critic that are somewhere else."""
    setting = exact_setting()
    generator = torch.Generator().manual_seed(3)
    for role in (Role.STUDENT, Role.CRITIC):
        for parameter in setting.cast.parameters(role):
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return exact_context(setting, **options)


def student_gradient(context: StepContext, loss: Tensor) -> Tensor:
    parameters = context.setting.cast.parameters(Role.STUDENT)
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in found])


ROLLOUT = StudentRollout(FixedGrid(exact_path(2)))


def test_the_gradient_flows_through_teacher_and_critic() -> None:
    """Without it the loss would have another gradient altogether."""
    term = ScoreIdentity(ROLLOUT, 1.2, normaliser=NoNormaliser())
    ours = student_gradient(*_loss(term))
    context = perturbed_context()
    question = context.question(term.rollout, term.kernel, term.tau, term.name)
    closed = identity_product(
        question.rolled.x0,
        question.probe.cond(Role.TEACHER),
        question.probe.cond(Role.CRITIC),
        1.2,
        SquaredDistance(),
    ).mean()
    without = student_gradient(context, closed)
    assert float(ours.norm()) > 1e-3
    assert float((ours - without).norm() / without.norm()) > 0.2
    sample = question.noised.sample.detach().requires_grad_()
    answer = context.backbone.x0(Role.TEACHER, sample, question.noised.levels, context.condition)
    (into_sample,) = torch.autograd.grad(answer.sum(), sample)
    assert float(into_sample.abs().min()) > 0.0


def _loss(term: ScoreIdentity | RealUid) -> tuple[StepContext, Tensor]:
    context = perturbed_context()
    return context, term.loss(context)[0]


def test_nothing_is_left_to_do_where_teacher_and_critic_agree() -> None:
    """The critic's adapter is zero, so it is the exact teacher: the student's gradient is 0."""
    context = exact_context(exact_setting())
    for parameter in context.setting.cast.parameters(Role.STUDENT):
        parameter.data.add_(0.1)
    for term in (ScoreIdentity(ROLLOUT), RealUid(ROLLOUT, RealShares(1.0, 1.0))):
        loss, _ = term.loss(context)
        assert float(student_gradient(context, loss).abs().max()) == 0.0


def test_real_uid_without_data_is_uid() -> None:
    """alpha = beta = 1: the student's gradient is SiD's at 1/2, the critic's plain matching."""
    law = TauLaw(low=TAU, high=TAU)
    uid = student_gradient(*_loss(RealUid(ROLLOUT, RealShares(1.0, 1.0), tau=law)))
    sid = student_gradient(
        *_loss(ScoreIdentity(ROLLOUT, 0.5, tau=law, normaliser=NoNormaliser(), name="uid"))
    )
    cosine, ratio = compare(uid, sid)
    assert cosine == pytest.approx(1.0, abs=1e-6)
    assert ratio == pytest.approx(2.0, rel=1e-5)  # this network predicts x0
    context = perturbed_context(with_grad=False)
    ours, _ = RealUidCritic(ROLLOUT, RealShares(1.0, 1.0)).loss(context, Role.CRITIC)
    plain, _ = Critic(rollout=ROLLOUT).loss(context, Role.CRITIC)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0.0)


def test_real_data_leave_the_exact_critic_in_place() -> None:
    """Where student and data are alike, the teacher is the mixed objective's best answer.

    Checked at one noise level by the stationary point: its gradient there is sampling noise.
    """
    shares = RealShares(0.8, 0.9)
    generator = torch.Generator().manual_seed(0)
    x0 = MEAN + VARIANCE**0.5 * torch.randn(2, 200_000, 1, generator=generator).double()
    epsilon = torch.randn(2, 200_000, 1, generator=generator).double()
    level = Levels(torch.tensor(0.0), torch.tensor(1.0 - TAU), torch.tensor(TAU))
    mixture = GaussianMixture(torch.tensor([[MEAN]], dtype=torch.float64), [VARIANCE], [1.0])
    total = torch.zeros(2, dtype=torch.float64)
    for k, (share, factor) in enumerate(
        [(shares.alpha, shares.of_student), (1.0 - shares.alpha, shares.of_data)]
    ):
        sample = (1.0 - TAU) * x0[k] + TAU * epsilon[k]
        best = (sample - mixture.denoise(sample, level)) / TAU
        error = best - factor * (sample - x0[k]) / TAU
        total += share * torch.stack([error.mean(), (error * sample).mean()])
    assert float(total.abs().max()) < 0.01


def test_real_uid_refuses_a_beta_without_data() -> None:
    with pytest.raises(ConfigError, match="set beta to 1"):
        RealUidMethod(alpha=1.0, beta=0.9)


def test_guidance_strategies() -> None:
    position = torch.zeros(1)
    found = {
        name: [law.scale(position) for law in (laws.teacher, laws.critic, laws.training)]
        for name in ("teacher", "lsg", "zero-cfg", "anti-cfg")
        for laws in [laws_of(name, 2.0, -1.5)]
    }
    assert found == {
        "teacher": [2.0, 1.0, 1.0],
        "lsg": [2.0, 2.0, 2.0],
        "zero-cfg": [1.0, 0.0, 0.0],
        "anti-cfg": [1.0, -1.5, 1.0],
    }
    with pytest.raises(ConfigError, match="below 0"):
        Sid(anti_scale=1.0)


def test_epsilon_variance_is_the_papers_weight() -> None:
    """sigma^2 (epsilon_teacher - epsilon_critic), each epsilon read off x0."""
    context = perturbed_context()
    question = context.question(ROLLOUT, ScoreIdentity(ROLLOUT).kernel, TauLaw(), "w")
    probe, levels = question.probe, question.probe.levels
    teacher, critic = probe.cond(Role.TEACHER), probe.cond(Role.CRITIC)
    epsilons = [(probe.sample - levels.alpha * x) / levels.sigma for x in (teacher, critic)]
    wanted = levels.sigma.square() * (epsilons[0] - epsilons[1])
    scale = EpsilonVariance().scale(question.rolled.x0, teacher, question)
    torch.testing.assert_close((critic - teacher) / scale, wanted, rtol=1e-4, atol=1e-6)


IDENTITY = IdentityConfig(
    num_steps=100, learning_rate=0.02, critic_learning_rate=0.06, critic_updates=4, critic_warmup=40
)
MATCH = MatchConfig(
    num_steps=80, learning_rate=0.04, critic_learning_rate=0.08, critic_updates=2, critic_warmup=20
)


@pytest.mark.parametrize(
    "method",
    [Sid(match=IDENTITY), Sim(match=IDENTITY), RealUidMethod(match=MATCH)],
    ids=["sid", "sim", "realuid"],
)
def test_a_linear_student_reaches_mean_and_variance_in_one_step(method: Method) -> None:
    mean, variance = moments(finish(exact_run(method, batch_size=48)))
    assert abs(mean - MEAN) < 0.08
    assert abs(variance / VARIANCE - 1.0) < 0.25


def test_a_few_step_student_matches_as_the_mixture_of_its_steps_outputs() -> None:
    """What is matched is the mixture, not each step's output by itself."""
    run = finish(
        exact_run(SidFewStep(match=IDENTITY), num_steps=2, batch_size=48, stochasticity=1.0)
    )
    student, average = Role.STUDENT, Role.AVERAGE
    run.setting.cast.copy(student, average)
    context = exact_context(run.setting, count=400, with_grad=False)
    exits = [StudentRollout(run.frame.grid, Exit(k, k)) for k in range(2)]
    mixture = torch.cat([context.rolled(rollout).x0 for rollout in exits])
    assert abs(float(mixture.mean()) - MEAN) < 0.08
    assert abs(float(mixture.var()) / VARIANCE - 1.0) < 0.25


def test_rotations_of_a_network_learn_by_score_distillation() -> None:
    """Student and critic only turn weights; the base is left alone."""
    match = dataclasses.replace(
        MATCH, num_steps=250, learning_rate=0.01, critic_learning_rate=0.02, critic_updates=3
    )
    run = exact_run(Wadi(match=match), batch_size=48, backbone=ResidualBackbone(), rank=8)
    names = [name for name, _ in run.setting.cast.named(Role.CRITIC)]
    assert all(".lorad_" in name for name in names)
    layer = run.backbone.denoiser.get_parameter("small.second.base.weight").detach()
    before = layer.clone()
    mean, variance = moments(finish(run))
    assert abs(mean - MEAN) < 0.1
    assert abs(variance / VARIANCE - 1.0) < 0.25
    assert torch.equal(layer, before)


def test_a_rotation_layer_is_the_merged_weight_and_keeps_norms() -> None:
    torch.manual_seed(0)
    layer = RoleLayer(nn.Linear(6, 3))
    update = LoradUpdate(layer.base, 2, torch.Generator().manual_seed(1))  # pyright: ignore
    layer.updates[Role.STUDENT.name] = update
    x = torch.randn(5, 6)
    with acting_as(Role.STUDENT):
        assert torch.equal(layer(x), layer.base(x))  # A is zero
        update.a.data.normal_()
        for scale in (1.0, 0.5):
            with acting_as(Role.STUDENT.scaled(scale)):
                weight = merged(layer.weight, update.a, update.b, scale)
                torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
                torch.testing.assert_close(weight.norm(dim=1), layer.weight.norm(dim=1))
    assert torch.equal(layer(x), layer.base(x))  # the teacher
