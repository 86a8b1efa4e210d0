"""The twin: the student at negative time as its own critic, without a second network."""

import torch
from torch import Tensor, nn

from fewstep import sampling
from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.critics import Critic, DenoisingTerm, MinSnr
from fewstep.trainer.components.grids import ANY_EXIT, LAST_EXIT, FixedGrid, even_path
from fewstep.trainer.components.kernels import Renoise
from fewstep.trainer.components.rollouts import RealLatents, StudentRollout
from fewstep.trainer.components.signals import ClampedPull, FlowTime, ScoreDifference
from fewstep.trainer.components.targets import Guided
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.context import Setting
from fewstep.trainer.levels import Levels, levels_at
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import FullPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import SingleRoute
from fewstep.trainer.stages import Stage
from tests.trainer.analytic import (
    CPU,
    MEAN,
    SHAPE,
    VARIANCE,
    ExactBackbone,
    ExactDenoiser,
    exact_book,
    exact_context,
    exact_latents,
    exact_path,
    exact_run,
    finish,
    learner,
    moments,
)


class TwoClocks(nn.Module):
    """`ExactDenoiser`'s features twice: columns 0 to 5 answer at t, 6 to 11 at -t."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = ExactDenoiser()
        self.head = nn.Linear(12, 1, bias=False)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[0, 0] = self.head.weight[0, 6] = 1.0

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        features = self.exact.features(sample, timestep.abs())
        is_twin = (timestep < 0.0).to(features).reshape(-1, 1, 1, 1, 1)
        both = torch.cat([features * (1.0 - is_twin), features * is_twin], dim=-1)
        return self.head(both).squeeze(-1)


class TwinBackbone(ExactBackbone):
    """The exact teacher at either clock."""

    def __init__(self, schedule: NoiseSchedule | None = None) -> None:
        super().__init__()
        self.schedule = Flow() if schedule is None else schedule
        self.both = TwoClocks()

    @property
    def denoiser(self) -> nn.Module:
        return self.both


def twin_setting() -> Setting:
    """A student with weights of its own, all of them open, that has left the teacher."""
    backbone = TwinBackbone()
    cast = Cast(backbone.denoiser, backbone.own_networks)
    cast.add(Role.STUDENT, FullPolicy(), torch.Generator())
    weight = student_weight(cast)
    with torch.no_grad():
        weight[0, :6] = torch.tensor([0.5, 0.6, 0.0, 0.0, 0.2, 0.0])
    book, latents = exact_book(backbone), exact_latents()
    return Setting(backbone, cast, book, latents, (SHAPE,), SingleRoute())


def student_weight(cast: Cast) -> nn.Parameter:
    """Of the student's head, (1, 12); the exact denoiser below it has no part."""
    (weight,) = (p for name, p in cast.named(Role.STUDENT) if name == "head.weight")
    return weight


def one_step() -> StudentRollout:
    return StudentRollout(FixedGrid(exact_path(1)))


def test_a_twin_is_told_the_negative_time_and_nothing_else_differs() -> None:
    told: list[Tensor] = []

    class Listening(TwinBackbone):
        def output(
            self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
        ) -> Tensor:
            told.append(timestep)
            return super().output(network, sample, timestep, condition)

    backbone = Listening()
    levels = levels_at(backbone.schedule, torch.tensor([0.25, 0.75]))
    sample, condition = torch.randn((2, *SHAPE)), backbone.encode(["", ""])
    plain = backbone.x0(Role.STUDENT, sample, levels, condition)
    twin = backbone.x0(Role.TWIN, sample, levels, condition)
    assert told[0].tolist() == [250.0, 750.0]
    assert told[1].tolist() == [-250.0, -750.0]
    torch.testing.assert_close(plain, twin)  # this network says the same at either clock
    assert dict(backbone.evaluations) == {"student": 4}


def test_names_and_strengths_keep_the_clock() -> None:
    assert Role.STUDENT.twin() == Role.TWIN != Role.STUDENT
    assert Role.TWIN.expert(1) == Role.STUDENT.expert(1).twin()
    assert Role.TWIN.scaled(0.5).clock == -1
    assert Role.TWIN.twin() == Role.TWIN


def test_a_trained_twin_is_the_posterior_mean_of_what_the_student_draws() -> None:
    """Student: x0 = a + b z, so N(a, b^2); its exact denoiser at one level is linear."""
    sigma, alpha = 0.6, 0.4
    setting = twin_setting()
    weight = student_weight(setting.cast)
    before = weight.detach().clone()
    tau = TauLaw(low=sigma, high=sigma)
    term = DenoisingTerm(one_step(), tau=tau)
    optimizer = learner([weight], 0.03, beta1=0.9)
    for step in range(300):
        context = exact_context(setting, count=256, step=step)
        optimizer.update([lambda c=context: term.loss(c)], 1.0 - step / 300)
    # at sigma = 1: exact = MEAN, sample = z, one = 1
    mean, variance = 0.5 * MEAN + 0.2, 0.6**2
    pull = alpha * variance / (alpha**2 * variance + sigma**2)
    sample = torch.linspace(-1.0, 2.0, 16).reshape(-1, 1, 1, 1)
    exact = mean + pull * (sample - alpha * mean)
    levels = Levels.full(Flow().level(1000.0 * sigma), len(sample), CPU)
    with torch.no_grad():
        found = setting.backbone.x0(
            Role.TWIN, sample, levels, setting.backbone.encode([""] * len(sample))
        )
    assert (found - exact).abs().max() < 0.05
    teacher = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (sample - alpha * MEAN)
    assert (teacher - exact).abs().max() > 0.4
    assert torch.equal(weight[0, :6], before[0, :6])  # the student's own side has not moved


def test_a_twins_loss_sends_no_gradient_into_what_it_learns_from() -> None:
    """Also where it shares the rollout, whose result does carry the student's gradient."""
    setting = twin_setting()
    with torch.no_grad():
        student_weight(setting.cast)[0, 6:] += 0.1  # no longer the teacher's answer
    context, rollout = exact_context(setting), one_step()
    tau = TauLaw(low=0.2, high=0.9)
    match = ScoreDifference(rollout, Guided(), critic=Guided(role=Role.TWIN), tau=tau, name="twin")
    follow = DenoisingTerm(rollout, tau=tau)
    calls = []
    for term in (match, follow):
        loss, _ = term.loss(context)
        (gradient,) = torch.autograd.grad(loss, [student_weight(setting.cast)])
        calls.append(sum(setting.backbone.evaluations.values()))
        is_twin = term is follow
        assert (gradient[0, :6].abs().max() == 0.0) == is_twin
        assert (gradient[0, 6:].abs().max() == 0.0) != is_twin
    assert calls[1] - calls[0] == 64  # rollout and noise were made once


def test_the_twins_loss_is_that_of_a_critic_with_the_same_laws() -> None:
    """On one rollout without gradient, under the same weight."""
    setting = twin_setting()
    tau = TauLaw(low=0.3, high=0.3)
    critic = Critic(one_step(), tau=tau, weight=MinSnr(), role=Role.TWIN)
    context = exact_context(setting, with_grad=False)
    expected, _ = critic.loss(context, Role.TWIN)
    term = DenoisingTerm(one_step(), tau=tau, weight=MinSnr(), name="critic")
    found, _ = term.loss(exact_context(setting))
    torch.testing.assert_close(found, expected)


def test_matching_against_the_twin_is_twinflows_rectification() -> None:
    """0.5 |v(z) - sg(v(z) - clamp(v(x_tau, -tau) - v(x_tau, tau)))|^2 in velocities, at t = 1."""
    setting = twin_setting()
    backbone, weight = setting.backbone, student_weight(setting.cast)
    with torch.no_grad():
        weight[0, 6:] += torch.linspace(-0.6, 0.6, 6)
    context, rollout, tau = exact_context(setting), one_step(), TauLaw(low=0.1, high=0.9)
    term = ScoreDifference(
        rollout,
        Guided(role=Role.STUDENT),
        critic=Guided(role=Role.TWIN),
        tau=tau,
        normaliser=FlowTime(),
        pull=ClampedPull(1.0),
    )
    (found,) = torch.autograd.grad(term.loss(context)[0], [weight])

    question = exact_context(setting).question(rollout, Renoise(), tau, "dm")
    sample, time = question.probe.sample, question.probe.levels.timestep
    noise = question.rolled.sample
    network = backbone.own_networks["student"]

    def velocity(x: Tensor, clock: Tensor) -> Tensor:
        levels = levels_at(Flow(), clock.abs() / 1000.0)
        return sampling.from_x0("flow", network(x, clock), x, levels)

    apart = velocity(sample, -time) - velocity(sample, time)
    assert (apart.abs() > 1.0).any()
    assert (apart.abs() < 1.0).any()
    drawn = velocity(noise, torch.full_like(time, 1000.0))
    aim = (drawn - apart.clamp(-1.0, 1.0)).detach()
    (expected,) = torch.autograd.grad(0.5 * (drawn - aim).square().mean(), [weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 0.01


def test_flow_time_makes_differences_of_x0_those_of_velocities() -> None:
    for schedule in (Flow(), Vp()):
        levels = levels_at(schedule, torch.tensor([0.2, 0.5, 0.9]))
        generator = torch.Generator().manual_seed(0)
        teacher, critic, sample = torch.randn((3, 3, *SHAPE), generator=generator).unbind(0)
        total = levels.alpha + levels.sigma

        def velocity(x0: Tensor, sample=sample, levels=levels, total=total) -> Tensor:  # noqa: ANN001
            epsilon = (sample - levels.alpha * x0) / levels.sigma
            return epsilon - x0  # dz/dtau of z = x / (alpha + sigma)

        backbone = TwinBackbone(schedule)
        setting = Setting(
            backbone,
            Cast(backbone.denoiser, backbone.own_networks),
            exact_book(backbone),
            None,
            (SHAPE,),
            SingleRoute(),
        )
        rollout = StudentRollout(FixedGrid(even_path(schedule, 1)))
        context = exact_context(setting, count=3)
        question = context.question(rollout, Renoise(), TauLaw(low=0.2, high=0.9), "x")
        found = FlowTime().scale(teacher, critic, question)
        probe = question.probe.levels
        torch.testing.assert_close(found, probe.sigma / (probe.alpha + probe.sigma))
        expected = velocity(critic) - velocity(teacher)
        torch.testing.assert_close((teacher - critic) * total / levels.sigma, expected)


def test_flow_matching_on_data_is_the_same_term_of_the_student() -> None:
    sigma, alpha = 0.5, 0.5
    setting = twin_setting()
    weight = student_weight(setting.cast)
    rollout, tau = RealLatents(FixedGrid(exact_path(1))), TauLaw(low=sigma, high=sigma)
    term = DenoisingTerm(rollout, role=Role.STUDENT, tau=tau, name="fm")
    assert term.needs_data
    assert not DenoisingTerm(one_step()).needs_data
    optimizer = learner([weight], 0.03, beta1=0.9)
    for step in range(300):
        context = exact_context(setting, count=256, step=step, uses_data=True)
        optimizer.update([lambda c=context: term.loss(c)], 1.0 - step / 300)
    sample = torch.linspace(-0.5, 2.0, 16).reshape(-1, 1, 1, 1)
    exact = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (sample - alpha * MEAN)
    levels = Levels.full(Flow().level(1000.0 * sigma), len(sample), CPU)
    with torch.no_grad():
        condition = setting.backbone.encode([""] * len(sample))
        found = setting.backbone.x0(Role.STUDENT, sample, levels, condition)
    assert (found - exact).abs().max() < 0.06


class TwinMatching(Dmd2):
    """DMD2 whose critic is the student's twin."""

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        rollout = StudentRollout(frame.grid, LAST_EXIT if frame.path.num_steps == 1 else ANY_EXIT)
        tau = self.match.tau
        match = ScoreDifference(
            rollout,
            Guided(),
            critic=Guided(role=Role.TWIN),
            tau=tau,
            normaliser=FlowTime(),
            name="twin",
        )
        follow = DenoisingTerm(rollout, tau=tau)
        return (
            Stage(
                name="twin",
                num_steps=self.match.num_steps,
                terms=(Weighted(match), Weighted(follow, 4.0)),
                learning_rate=self.match.learning_rate,
            ),
        )


def test_a_student_reaches_mean_and_variance_with_its_twin_for_a_critic() -> None:
    """From variance 0 to N(1.5, 0.25) with one set of parameters and no critic's updates."""
    match = MatchConfig(num_steps=600, learning_rate=0.02)
    run = exact_run(TwinMatching(match=match), batch_size=128, backbone=TwinBackbone())
    assert moments(run)[1] < 0.01
    assert set(run.setting.cast.policies) == {"student", "average"}
    mean, variance = moments(finish(run))
    assert abs(mean - MEAN) < 0.1
    assert abs(variance / VARIANCE - 1.0) < 0.3
