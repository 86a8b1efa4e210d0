"""The critic: weights of its error, what it converges to, and what happens to it on the way."""

import dataclasses

import pytest
import torch
from torch import nn

from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.components.critics import (
    Critic,
    CriticWeight,
    ImportanceWeight,
    MinSnr,
    OutputWeight,
    TransitionWeight,
)
from fewstep.trainer.components.grids import Exit, FixedGrid
from fewstep.trainer.components.kernels import Interval, Noised, OwnPrediction, Renoise
from fewstep.trainer.components.rollouts import RealLatents, Rolled, StudentRollout
from fewstep.trainer.components.taus import AboveEnd, TauLaw
from fewstep.trainer.context import Setting
from fewstep.trainer.data.latent_book import LatentBook
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.draws import Draws
from fewstep.trainer.levels import Levels
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.parameters.policies import FullPolicy, LoraPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import ConditionRoute, PhaseRoute
from fewstep.trainer.stages import Copy, Reset, Stage
from tests.trainer.analytic import (
    CPU,
    MEAN,
    VARIANCE,
    ExactBackbone,
    exact_book,
    exact_context,
    exact_path,
    exact_run,
    exact_setting,
    learner,
)
from tests.trainer.test_kernels import middle, noised_at, normal, rolled_at

SCHEDULES: list[NoiseSchedule] = [Flow(), Vp()]


def weights(law: CriticWeight, noised: Noised, rolled: Rolled) -> torch.Tensor:
    return law.of(noised, rolled, "flow").flatten()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_transition_weight_bounds_what_the_interval_target_blows_up(
    schedule: NoiseSchedule,
) -> None:
    """Weight times the target's own variance, pull^2, stays bounded where b goes to 0."""
    rolled = rolled_at(schedule, middle(schedule), normal(1, 4), normal(2, 4))
    s = rolled.following
    grown, bounded = [], []
    for margin in (0.2, 0.02, 0.004):
        kernel = Interval(margin)
        noised = noised_at(kernel, rolled, 0.0)
        pull = noised.levels.alpha * s.sigma**2 / (s.alpha**2 * noised.transition)
        grown.append(float(weights(OutputWeight(), noised, rolled)[0] * pull[0].square()))
        bounded.append(float(weights(TransitionWeight(), noised, rolled)[0] * pull[0].square()))
    assert grown[-1] > 10.0 * grown[0]
    # alpha^2 s^4 / (alpha_s^4 sigma^4) at the limit tau = s
    assert max(bounded) <= (s.sigma / (s.alpha * s.sigma)) ** 2 * 1.01


def test_a_plain_re_noised_sample_has_the_plain_output_weight() -> None:
    rolled = rolled_at(Flow(), Flow().level(0.0), normal(1, 8), normal(2, 8))
    noised = noised_at(Renoise(), rolled, 0.7)
    plain = weights(OutputWeight(), noised, rolled)
    torch.testing.assert_close(weights(TransitionWeight(), noised, rolled), plain)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_min_snr_is_the_snr_below_gamma(schedule: NoiseSchedule) -> None:
    rolled = rolled_at(schedule, schedule.level(0.0, 0.0), normal(1, 4), normal(2, 4))
    for position in (0.05, 0.4, 0.9):
        noised = noised_at(Renoise(), rolled, position)
        snr = (noised.levels.alpha / noised.levels.sigma).square().flatten()
        expected = torch.minimum(snr, torch.full_like(snr, 5.0))
        torch.testing.assert_close(weights(MinSnr(5.0), noised, rolled), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_importance_of_a_plain_re_noised_sample_is_one(schedule: NoiseSchedule) -> None:
    rolled = rolled_at(schedule, schedule.level(0.0, 0.0), normal(1, 64), normal(2, 64))
    noised = noised_at(Renoise(), rolled, 0.6)
    ratio = weights(ImportanceWeight(), noised, rolled) / weights(MinSnr(), noised, rolled)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=1e-4)


def test_the_importance_is_the_ratio_of_the_two_noises_densities() -> None:
    """exp(-e_mix^2 / 2) / exp(-e^2 / 2) with e_mix = (x_tau - alpha x0) / sigma; one value each."""
    rolled = rolled_at(Flow(), middle(Flow()), normal(1, 64), normal(2, 64))
    noised = noised_at(OwnPrediction(Interval()), rolled, 0.8)
    ratio = weights(ImportanceWeight(), noised, rolled) / weights(MinSnr(), noised, rolled)
    mixed = ((noised.sample - 0.2 * rolled.x0) / 0.8).flatten()
    expected = torch.exp(-mixed.square() / 2) / torch.exp(-noised.epsilon.flatten().square() / 2)
    torch.testing.assert_close(ratio, expected.clamp(0.0067379, 148.413), rtol=1e-4, atol=1e-5)


def shifted_setting(shift: float) -> Setting:
    """The exact teacher beside real data of another mean."""
    setting = exact_setting()
    assert setting.latents is not None
    (bucket,) = setting.latents.buckets
    moved = dataclasses.replace(bucket, parts=tuple(part + shift for part in bucket.parts))
    return dataclasses.replace(setting, latents=LatentBook((moved,)))


def trained(
    critic: Critic, setting: Setting | None = None, *, uses_data: bool = False, steps: int = 150
) -> ExactBackbone:
    """A critic that follows a fixed student: the teacher, walking in few steps."""
    setting = exact_setting() if setting is None else setting
    optimizer = learner(setting.cast.parameters(Role.CRITIC), 0.02, beta1=0.9)
    for step in range(steps):
        context = exact_context(setting, count=256, step=step, with_grad=False, uses_data=uses_data)
        optimizer.update([lambda c=context: critic.loss(c, Role.CRITIC)], 1.0 - step / steps)
    assert isinstance(setting.backbone, ExactBackbone)
    return setting.backbone


def critic_answers(backbone: ExactBackbone, sample: torch.Tensor, sigma: float) -> torch.Tensor:
    levels = Levels.full(Flow().level(1000.0 * sigma), len(sample), CPU)
    with torch.no_grad():
        return backbone.x0(
            Role.CRITIC,
            sample,
            levels,
            exact_book(backbone).conditions.take(torch.zeros(len(sample), dtype=torch.long)),
        )


def test_an_interval_critic_learns_the_score_of_where_steps_end() -> None:
    """Mean m' and variance V of x_s give E[x0 | x_tau] by Tweedie of N(a m', a^2 V + b^2)."""
    sigma, alpha = 0.7, 0.3  # one level: there a linear critic can be exact
    tau = TauLaw(AboveEnd(0.05), low=sigma, high=sigma)
    rollout = StudentRollout(FixedGrid(exact_path(2)), Exit(0, 0))
    critic = Critic(rollout, kernel=Interval(0.05), tau=tau, weight=TransitionWeight())
    backbone = trained(critic)
    # the teacher's first step from x_1 = e: x_s = 0.5 m + 0.5 e
    mean, variance, a = 0.5 * MEAN, 0.25, alpha / 0.5
    spread = a * a * variance + sigma**2 - (a * 0.5) ** 2
    sample = torch.linspace(-1.0, 2.0, 16).reshape(-1, 1, 1, 1)
    exact = (sample - sigma**2 * (sample - a * mean) / spread) / alpha
    found = critic_answers(backbone, sample, sigma)
    assert (found - exact).abs().max() < 0.1
    teacher = MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (sample - alpha * MEAN)
    assert (teacher - exact).abs().max() > 0.2


def test_a_critic_of_real_latents_becomes_a_teacher_of_them() -> None:
    sigma, alpha = 0.6, 0.4
    setting = shifted_setting(1.0)
    rollout, tau = RealLatents(FixedGrid(exact_path(1))), TauLaw(low=sigma, high=sigma)
    backbone = trained(Critic(rollout, tau=tau), setting, uses_data=True, steps=400)
    sample = torch.linspace(-1.0, 2.0, 16).reshape(-1, 1, 1, 1)
    pull = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    exact = (MEAN + 1.0) + pull * (sample - alpha * (MEAN + 1.0))
    assert (critic_answers(backbone, sample, sigma) - exact).abs().max() < 0.1


def test_ida_blends_the_critic_with_the_student_after_every_step() -> None:
    match = MatchConfig(num_steps=2, ida=0.75, critic_warmup=0, critic_updates=1)
    plain = exact_run(Dmd2(match=dataclasses.replace(match, ida=1.0)), batch_size=8)
    pulled = exact_run(Dmd2(match=match), batch_size=8)
    advance(plain)
    advance(pulled)
    cast = plain.setting.cast
    pairs = zip(cast.parameters(Role.CRITIC), cast.parameters(Role.STUDENT), strict=True)
    expected = [0.75 * critic + 0.25 * student for critic, student in pairs]
    for found, wanted in zip(pulled.setting.cast.parameters(Role.CRITIC), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_copies_and_resets_happen_at_their_moments() -> None:
    class Recorded(Dmd2):
        def stages(self, frame: object) -> tuple[Stage, ...]:
            (stage,) = Dmd2.stages(self, frame)  # pyright: ignore[reportArgumentType]
            actions = (Copy(Role("snapshot"), Role.CRITIC, at=0.5), Reset(Role.CRITIC, at=0.75))
            return (dataclasses.replace(stage, actions=actions),)

        def roles(self, frame: object) -> tuple[tuple[Role, LoraPolicy], ...]:
            return ((Role("snapshot"), LoraPolicy(("head",), 1, 1.0)),)

    match = MatchConfig(num_steps=4, critic_warmup=0, critic_updates=1)
    run = exact_run(Recorded(match=match), batch_size=8)
    cast, seen = run.setting.cast, []
    for _ in range(4):
        advance(run)
        seen.append({k: v.clone() for k, v in cast.tensors(Role.CRITIC).items()})
    for name, value in cast.tensors(Role("snapshot")).items():
        torch.testing.assert_close(value, seen[1][name], rtol=0, atol=0)
    up = "head.lora_B.weight"
    assert seen[1][up].abs().max() > 0.0
    assert seen[2][up].abs().max() == 0.0  # after the third of four steps
    assert seen[3][up].abs().max() > 0.0  # and it learns on


def test_a_reset_full_copy_is_the_base_again() -> None:
    setting = exact_setting()
    role = Role("whole")
    setting.cast.add(role, FullPolicy(), torch.Generator())
    network = setting.backbone.own_networks[role.name]
    assert isinstance(network, nn.Module)
    for parameter in network.parameters():
        parameter.data.add_(1.0)
    Reset(role).act(setting.cast)
    expected = dict(ExactBackbone().denoiser.named_parameters())
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_phases_split_the_noise_at_the_first_level_of_the_cleaner_one() -> None:
    route = PhaseRoute((1.0, 0.5, 0.25, 0.0))
    assert route.experts() == (0, 1, 2)
    found = {sigma: route.expert_at(sigma) for sigma in (1.0, 0.51, 0.5, 0.26, 0.25, 0.1, 0.0)}
    assert found == {1.0: 0, 0.51: 0, 0.5: 1, 0.26: 1, 0.25: 2, 0.1: 2, 0.0: 2}
    assert route.student(Flow().level(750.0), None) == Role("student-0")
    assert route.student(Flow().level(500.0), None) == Role("student-1")


def test_a_condition_route_draws_its_own_group_only_and_all_of_it() -> None:
    book: PromptBook = exact_book(ExactBackbone(), 5)
    route = ConditionRoute(((0, 2), (1, 3, 4)))
    for expert, group in enumerate(route.groups):
        draws = Draws(seed=0, step=expert, update=0, samples=range(200), device=CPU)
        assert set(route.draw_prompts(book, draws, expert).tolist()) == set(group)
