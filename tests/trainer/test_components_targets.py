"""Guided targets on an exact mixture: the guidance law, and how targets are put together."""

import math

import pytest
import torch

from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.components.probe import Probe
from fewstep.trainer.components.targets import (
    AlongPath,
    Annealed,
    ConstantGuidance,
    Guided,
    IntervalGuidance,
    Mixture,
    Solved,
    Target,
)
from fewstep.trainer.levels import levels_at
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role
from tests.trainer.analytic import MEAN, SHAPE, VARIANCE, ExactBackbone, exact_setting
from tests.trainer.oracles import MixtureBackbone, mixture_probe, mixture_setting

FLOW = MixtureBackbone(Flow())


@pytest.mark.parametrize(("w", "evaluations"), [(1.0, 16), (0.0, 16), (2.5, 32), (-1.0, 32)])
def test_guidance_asks_only_the_half_that_counts(w: float, evaluations: int) -> None:
    backbone = MixtureBackbone(Flow())
    probe = mixture_probe(backbone)
    x0 = Guided(ConstantGuidance(w)).x0(probe, 0.0)
    assert backbone.evaluations == {"teacher": evaluations}
    cond, uncond = probe.cond(Role.TEACHER), probe.uncond(Role.TEACHER)
    torch.testing.assert_close(x0, uncond + w * (cond - uncond), rtol=0, atol=1e-6)
    assert (cond - uncond).abs().max() > 0.1


def test_a_question_is_asked_once() -> None:
    backbone = MixtureBackbone(Flow())
    probe = mixture_probe(backbone)
    for _ in range(3):
        for w in (3.0, 1.0, 0.0):
            Guided(ConstantGuidance(w)).x0(probe, 0.0)
    assert backbone.evaluations == {"teacher": 32}


@pytest.mark.parametrize("schedule", [Flow(), Vp()])
def test_gated_guidance_is_on_inside_its_interval_only(schedule: NoiseSchedule) -> None:
    probe = mixture_probe(MixtureBackbone(schedule))
    x0 = Guided(IntervalGuidance(4.0, 0.3, 0.6)).x0(probe, 0.0)
    cond, uncond = probe.cond(Role.TEACHER), probe.uncond(Role.TEACHER)
    position = torch.linspace(0.1, 0.9, 16)
    inside = ((position > 0.3) & (position < 0.6)).reshape(-1, 1, 1, 1)
    assert 0 < inside.sum() < 16
    torch.testing.assert_close(x0, torch.where(inside, uncond + 4.0 * (cond - uncond), cond))


def test_guidance_outside_its_interval_costs_nothing() -> None:
    backbone = MixtureBackbone(Flow())
    probe = mixture_probe(backbone, low=0.7)
    Guided(IntervalGuidance(4.0, 0.0, 0.5)).x0(probe, 0.0)
    assert backbone.evaluations == {"teacher": 16}


def test_a_mixture_is_the_weighted_mean() -> None:
    setting = mixture_setting()
    assert isinstance(setting.backbone, MixtureBackbone)
    probe = mixture_probe(setting.backbone)
    parts = (Guided(), Guided(ConstantGuidance(0.0)), Guided(role=Role.CRITIC))
    x0 = Mixture(parts, (0.5, 0.3, 0.2)).x0(probe, 0.0)
    expected = 0.5 * probe.cond(Role.TEACHER) + 0.3 * probe.uncond(Role.TEACHER)
    torch.testing.assert_close(x0, expected + 0.2 * probe.cond(Role.CRITIC))


def gaussian_probe(count: int = 32) -> Probe:
    backbone = ExactBackbone()
    sample = torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(0))
    levels = levels_at(Flow(), torch.linspace(0.2, 1.0, count))
    null = backbone.encode([""])
    return Probe(backbone, sample, levels, sample, null.expand(count), null)


def test_more_solver_steps_converge_to_the_exact_end_of_the_ode() -> None:
    probe = gaussian_probe()
    levels = probe.levels
    std = (levels.alpha**2 * VARIANCE + levels.sigma**2).sqrt()
    exact = MEAN + math.sqrt(VARIANCE) * (probe.sample - levels.alpha * MEAN) / std
    errors = [(Solved(n).x0(probe, 0.0) - exact).abs().mean().item() for n in (8, 16, 32, 64)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert fine < 0.62 * coarse  # a first-order solver
    assert errors[-1] < 0.01


def test_one_solver_step_is_the_plain_prediction() -> None:
    probe = gaussian_probe()
    assert torch.equal(Solved(1).x0(probe, 0.0), Guided().x0(probe, 0.0))


def test_a_solver_guides_every_step() -> None:
    backbone = MixtureBackbone(Flow())
    Solved(3, ConstantGuidance(2.0)).x0(mixture_probe(backbone), 0.0)
    assert backbone.evaluations == {"teacher": 3 * 32}


def test_an_annealed_target_goes_from_the_critic_to_the_teacher() -> None:
    setting = exact_setting()
    for name, parameter in setting.cast.named(Role.CRITIC):
        if name.endswith("lora_B.weight"):
            parameter.data.fill_(0.2)
    probe = gaussian_probe()
    probe = Probe(
        setting.backbone,
        probe.sample,
        probe.levels,
        probe.epsilon,
        probe.condition,
        probe.null_condition,
    )
    teacher, critic = probe.cond(Role.TEACHER), probe.cond(Role.CRITIC)
    assert (critic - teacher).abs().max() > 0.05
    target = Annealed(ConstantGuidance(1.0), until=0.5)
    assert torch.equal(target.x0(probe, 0.0), critic)
    for progress in (0.5, 0.7, 1.0):
        assert torch.equal(target.x0(probe, progress), teacher)
    assert target.blend(0.25) == pytest.approx(0.5)
    # the head is linear, so a blend of adapters is a blend of answers
    torch.testing.assert_close(target.x0(probe, 0.25), 0.5 * (teacher + critic))


def test_a_strength_below_one_starts_nearer_to_the_teacher() -> None:
    target = Annealed(ConstantGuidance(1.0), strength=0.4, until=1.0)
    assert [target.blend(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0])


def test_a_path_is_followed_in_order_and_stays_at_its_end() -> None:
    probe = mixture_probe(FLOW)
    stops: tuple[Target, ...] = tuple(Guided(ConstantGuidance(w)) for w in (3.0, 2.0, 1.0))
    path = AlongPath(stops, arrive=0.6)
    for progress, stop in ((0.0, 0), (0.29, 0), (0.31, 1), (0.59, 1), (0.6, 2), (1.0, 2)):
        assert torch.equal(path.x0(probe, progress), stops[stop].x0(probe, 0.0))


def test_a_policy_scales_its_effect_with_the_role() -> None:
    """What `Annealed` relies on: a role at scale 0 is the base alone."""
    setting = exact_setting(())
    setting.cast.add(Role.CRITIC, LoraPolicy(("head",), 1, 1.0), torch.Generator().manual_seed(0))
    for parameter in setting.cast.parameters(Role.CRITIC):
        parameter.data.fill_(0.3)
    probe = gaussian_probe()
    levels, condition = probe.levels, probe.condition
    at = [
        setting.backbone.x0(Role.CRITIC.scaled(s), probe.sample, levels, condition)
        for s in (0.0, 0.5, 1.0)
    ]
    assert torch.equal(at[0], setting.backbone.x0(Role.TEACHER, probe.sample, levels, condition))
    torch.testing.assert_close(at[1], 0.5 * (at[0] + at[2]))
