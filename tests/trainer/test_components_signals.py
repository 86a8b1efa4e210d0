"""Matching and guidance augmentation: together, at one probe, they are the guided difference."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.components.grids import ANY_EXIT, FixedGrid, even_path
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.signals import (
    GuidanceAugmentation,
    MeanAbs,
    Normaliser,
    ScoreDifference,
)
from fewstep.trainer.components.targets import ConstantGuidance, Guided, IntervalGuidance
from fewstep.trainer.components.taus import Below, TauLaw
from fewstep.trainer.components.terms import Term
from fewstep.trainer.context import Question, Setting, StepContext
from fewstep.trainer.levels import positions_of
from fewstep.trainer.roles import Role
from tests.trainer.analytic import exact_context
from tests.trainer.oracles import mixture_setting


@dataclass(frozen=True, slots=True)
class ConstantScale(Normaliser):
    """The same everywhere, so that halves can be added."""

    value: float

    def scale(self, x0: Tensor, target: Tensor, question: Question) -> Tensor:
        return torch.full((len(x0), *[1] * (x0.ndim - 1)), self.value)


def rollout_of(schedule: NoiseSchedule) -> StudentRollout:
    return StudentRollout(FixedGrid(even_path(schedule, 3)), ANY_EXIT)


def gradient_of(terms: list[Term], setting: Setting, step: int) -> Tensor:
    """Of the terms' sum with respect to the student's x0, times its size."""
    context = exact_context(setting, count=6, step=step)
    rolled = context.rolled(rollout_of(setting.backbone.schedule))
    total = torch.stack([term.loss(context)[0] for term in terms]).sum()
    (gradient,) = torch.autograd.grad(total, rolled.x0)
    return gradient * rolled.x0.numel()


@pytest.mark.parametrize("schedule", [Flow(), Vp()])
@pytest.mark.parametrize("w", [0.0, 2.0, 7.5])
def test_augmentation_and_unguided_matching_are_guided_matching(
    schedule: NoiseSchedule, w: float
) -> None:
    """T_w - F = (T_c - F) + (w - 1)(T_c - T_u), where the normalisers are constant."""
    setting, rollout, scale = mixture_setting(schedule), rollout_of(schedule), ConstantScale(0.7)
    halves: list[Term] = [
        ScoreDifference(rollout, Guided(), normaliser=scale),
        GuidanceAugmentation(rollout, ConstantGuidance(w), normaliser=scale, name="dm"),
    ]
    whole: list[Term] = [ScoreDifference(rollout, Guided(ConstantGuidance(w)), normaliser=scale)]
    for step in range(3):
        together = gradient_of(halves, setting, step)
        expected = gradient_of(whole, setting, step)
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
        assert expected.abs().max() > 0.01


def test_halves_at_one_probe_share_the_teacher() -> None:
    setting, rollout = mixture_setting(), rollout_of(Flow())
    context = exact_context(setting, count=6)
    ScoreDifference(rollout, Guided(ConstantGuidance(3.0))).loss(context)
    before = dict(setting.backbone.evaluations)
    GuidanceAugmentation(rollout, ConstantGuidance(3.0), name="dm").loss(context)
    assert dict(setting.backbone.evaluations) == before


def test_the_augmentations_gradient_is_the_guidance_over_its_own_normaliser() -> None:
    setting, rollout = mixture_setting(), rollout_of(Flow())
    term = GuidanceAugmentation(rollout, ConstantGuidance(3.0), normaliser=MeanAbs(0.05))
    gradient = gradient_of([term], setting, 0)
    context = exact_context(setting, count=6)
    question = context.question(rollout, term.kernel, term.tau, "ca")
    cond, uncond = question.probe.cond(Role.TEACHER), question.probe.uncond(Role.TEACHER)
    distance = (question.rolled.x0 - cond).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = -2.0 * (cond - uncond) / distance.clamp(min=0.05)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-5, atol=1e-6)


def test_no_guidance_leaves_nothing_to_augment() -> None:
    setting = mixture_setting()
    term = GuidanceAugmentation(rollout_of(Flow()), ConstantGuidance(1.0))
    assert gradient_of([term], setting, 0).abs().max() == 0.0
    gated = GuidanceAugmentation(rollout_of(Flow()), IntervalGuidance(5.0, 0.99, 1.0))
    assert gradient_of([gated], setting, 0).abs().max() == 0.0


def test_augmentation_is_asked_at_its_own_levels() -> None:
    """Below the student's step, while matching keeps the whole span."""
    setting, rollout = mixture_setting(), rollout_of(Flow())
    below = TauLaw(Below())
    for step in range(20):
        context = exact_context(setting, count=8, step=step, with_grad=False)
        term = GuidanceAugmentation(rollout, ConstantGuidance(2.0), tau=below)
        question = context.question(rollout, term.kernel, term.tau, term.name)
        other = context.question(rollout, term.kernel, TauLaw(), "dm")
        asked = positions_of(Flow(), question.probe.levels)
        assert asked.max().item() <= question.rolled.position + 1e-6
        assert not torch.equal(question.probe.sample, other.probe.sample)


def test_matching_vanishes_where_the_critic_is_the_teacher() -> None:
    setting = mixture_setting()
    setting.backbone.own_networks["critic"] = setting.backbone.denoiser
    term = ScoreDifference(rollout_of(Flow()), Guided())
    assert gradient_of([term], setting, 0).abs().max() == 0.0


def test_a_context_answers_every_term_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms of the same laws and name: one rollout, one noise, one teacher and one critic call."""
    setting, rollout = mixture_setting(), rollout_of(Flow())
    context: StepContext = exact_context(setting, count=6)
    term = ScoreDifference(rollout, Guided())
    term.loss(context)
    before = dict(setting.backbone.evaluations)
    term.loss(context)
    assert dict(setting.backbone.evaluations) == before
