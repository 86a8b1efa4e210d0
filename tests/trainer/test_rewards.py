"""Rewards and preference pairs: they climb, they weigh, and they bound what they cannot know."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep.digits.data import load_digits, prompt_for
from fewstep.errors import ConfigError
from fewstep.trainer.components.grids import Exit, FixedGrid
from fewstep.trainer.components.kernels import Renoise
from fewstep.trainer.components.preferences import PsoTerm, Walk, policy_log_ratio
from fewstep.trainer.components.rewards import (
    DigitsReward,
    ProgramReward,
    Reward,
    RewardRank,
    RewardTerm,
    RewardTilt,
    reward_named,
    rewards_of,
)
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.signals import HuberPull, ScoreDifference, SquaredPull
from fewstep.trainer.components.targets import Guided
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.context import Setting
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.stages import Copy
from tests.trainer.analytic import (
    ExactBackbone,
    exact_context,
    exact_path,
    exact_setting,
    learner,
)

REFERENCE = Role("reference")
LAST = StudentRollout(FixedGrid(exact_path(2, 1.0)), Exit(-1, -1))


class VisibleBackbone(ExactBackbone):
    """Its pictures are its latents: one pixel, three of the four channels."""

    def decode_float(self, latents: Tensor) -> Tensor:
        return latents[:, :3]


class ClipBackbone(VisibleBackbone):
    """Its pictures are clips of two frames, the second one brighter by 1."""

    def decode_float(self, latents: Tensor) -> Tensor:
        return torch.stack([latents[:, :3], latents[:, :3] + 1.0], dim=2)


class Brightness(Reward):
    """The mean of the picture: its gradient is the same everywhere."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(prompts) == len(images)
        return images.mean(dim=(1, 2, 3))


def visible_setting() -> Setting:
    """The exact teacher with pictures and a reference student."""
    setting = exact_setting()
    backbone = VisibleBackbone()
    cast = Cast(backbone.denoiser, backbone.own_networks)
    generator = torch.Generator().manual_seed(0)
    for role in (Role.STUDENT, Role.CRITIC, REFERENCE):
        cast.add(role, LoraPolicy(("head",), 1, 1.0), generator)
    Copy(REFERENCE, Role.STUDENT).act(cast)
    return dataclasses.replace(setting, backbone=backbone, cast=cast)


def mean_brightness(setting: Setting) -> float:
    context = exact_context(setting, count=256, step=999, with_grad=False)
    return float(rewards_of(context, Brightness(), context.rolled(LAST).x0).mean())


def test_the_reward_gradient_ascends_through_the_decoder() -> None:
    setting = visible_setting()
    before = mean_brightness(setting)
    optimizer = learner(setting.cast.parameters(Role.STUDENT), 0.01)
    term = RewardTerm(LAST, Brightness())
    for step in range(20):
        optimizer.update([lambda s=step: term.loss(exact_context(setting, step=s))], 1.0)
    assert mean_brightness(setting) > before + 0.2


def test_a_share_of_the_samples_has_the_gradient_of_all_on_average() -> None:
    """Every sample counts 1 / (share * B) where it is drawn: parts of a batch add up."""
    context = exact_context(visible_setting(), count=64)
    x0 = context.rolled(LAST).x0
    term = RewardTerm(LAST, Brightness(), share=0.25)
    (grad,) = torch.autograd.grad(term.loss(context)[0], x0, retain_graph=True)
    drawn = context.draws.uniform("reward") < 0.25
    per_sample = grad.sum(dim=(1, 2, 3))
    assert 0 < int(drawn.sum()) < 32
    torch.testing.assert_close(per_sample, torch.where(drawn, -1.0 / 16.0, 0.0))


def test_a_clips_reward_is_the_mean_of_its_frames() -> None:
    setting = visible_setting()
    context = exact_context(setting, count=6)
    x0 = context.rolled(LAST).x0
    still = rewards_of(context, Brightness(), x0)
    clips = exact_context(dataclasses.replace(setting, backbone=ClipBackbone()), count=6)
    torch.testing.assert_close(rewards_of(clips, Brightness(), x0), still + 0.5)


def test_the_digits_reward_prefers_the_digit_that_was_asked_for() -> None:
    digits = load_digits().held_out()
    images = torch.from_numpy(digits.images[:40]).permute(0, 3, 1, 2).float() / 255.0
    images.requires_grad_()
    right = [prompt_for(int(label)) for label in digits.labels[:40]]
    wrong = [prompt_for(int(label + 1) % 10) for label in digits.labels[:40]]
    reward = reward_named("digits")
    good, bad = reward.score(images, right), reward.score(images, wrong)
    assert (good > bad).float().mean() > 0.9
    good.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0.0


def test_the_digits_reward_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="a sonnet"):
        DigitsReward().score(torch.zeros(1, 3, 64, 64), ["a sonnet"])


class Darkness(nn.Module):
    """A reward as people train them: convolutions, one number per picture."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).mean(dim=(1, 2, 3))


def exported(model: nn.Module, file: Path, size_px: int = 8) -> Path:
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(
        model.eval(), (torch.rand(2, 3, size_px, size_px),), dynamic_shapes=(batch,)
    )
    torch.export.save(program, file)
    return file


def test_an_exported_program_scores_like_the_module_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Darkness()
    reward = reward_named(str(exported(model, tmp_path / "reward.pt2")))
    assert isinstance(reward, ProgramReward)
    images = torch.rand(5, 3, 8, 8, requires_grad=True)
    scores = reward.score(images, [""] * 5)
    torch.testing.assert_close(scores, model(images))
    (found,) = torch.autograd.grad(scores.sum(), images)
    (expected,) = torch.autograd.grad(model(images).sum(), images)
    torch.testing.assert_close(found, expected)


def test_programs_that_cannot_be_rewards_are_refused(tmp_path: Path) -> None:
    reward = ProgramReward(exported(Darkness(), tmp_path / "reward.pt2"))
    with pytest.raises(ConfigError, match="shape \\(2, 3, 9, 8\\)"):
        reward.score(torch.rand(2, 3, 9, 8), ["", ""])
    pixels = ProgramReward(exported(nn.Conv2d(3, 1, 1), tmp_path / "pixels.pt2"))
    with pytest.raises(ConfigError, match="one number per picture"):
        pixels.score(torch.rand(2, 3, 8, 8), ["", ""])
    (tmp_path / "model.pt2").write_text("no archive")
    for name in (str(tmp_path / "model.pt2"), str(tmp_path / "missing.pt2"), "aesthetics"):
        with pytest.raises(ConfigError, match="pt2"):
            reward_named(name)


def test_equal_students_have_log_ratio_zero_and_a_gradient_towards_the_winner() -> None:
    """d loss / d r_winner = -beta / 2 at the reference: the winner's step becomes more likely."""
    setting = visible_setting()
    term = PsoTerm(FixedGrid(exact_path(2, 1.0)), Brightness(), REFERENCE, beta=4.0, clip=0.5)
    loss, metrics = term.loss(exact_context(setting, count=512))
    assert metrics["health/pso_margin"] == 0.0
    assert loss.item() == pytest.approx(float(np.log(2.0)), abs=1e-6)
    parameters = setting.cast.parameters(Role.STUDENT)
    before = mean_brightness(setting)
    optimizer = learner(parameters, 0.02)
    for step in range(30):
        optimizer.update([lambda s=step: term.loss(exact_context(setting, step=s))], 1.0)
    assert mean_brightness(setting) > before + 0.05


def test_the_log_ratio_is_the_one_of_the_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    sample, mine, other = torch.randn((3, 4, 2, 1, 1), generator=generator, dtype=torch.float64)
    for stochasticity in (1.0, 0.5):
        path = exact_path(4, stochasticity)
        noise = torch.randn(sample.shape, generator=generator, dtype=torch.float64)
        reached = path.advance(sample, other, 1, noise)
        found = policy_log_ratio(path, 1, Walk(sample, reached, reached), mine, other)
        mean = path.advance(sample, mine, 1, torch.zeros_like(noise))
        deviation = (path.advance(sample, mine, 1, torch.ones_like(noise)) - mean)[
            0, 0, 0, 0
        ].item()
        centre = path.advance(sample, other, 1, torch.zeros_like(noise))
        wanted = torch.distributions.Normal(mean, deviation).log_prob(reached)
        wanted = wanted - torch.distributions.Normal(centre, deviation).log_prob(reached)
        torch.testing.assert_close(found, wanted.mean(dim=(1, 2, 3)))


def test_outside_the_clip_a_pair_teaches_nothing() -> None:
    setting = visible_setting()
    for parameter in setting.cast.parameters(Role.STUDENT):
        parameter.data.add_(0.5)  # far from the reference
    term = PsoTerm(FixedGrid(exact_path(2, 1.0)), Brightness(), REFERENCE, clip=1e-4)
    loss, _ = term.loss(exact_context(setting))
    loss.backward()
    grads = [p.grad for p in setting.cast.parameters(Role.STUDENT)]
    assert all(g is not None and g.abs().max() < 1e-6 for g in grads)


def test_pairs_need_a_step_that_draws_noise() -> None:
    term = PsoTerm(FixedGrid(exact_path(2)), Brightness(), REFERENCE)
    with pytest.raises(ConfigError, match="set grid.stochasticity 1"):
        term.loss(exact_context(visible_setting()))


def test_ranks_weigh_the_pull_and_the_push_against_each_other() -> None:
    context = exact_context(visible_setting(), count=9)
    question = context.question(LAST, Renoise(), TauLaw())
    attract, repel = RewardRank(Brightness(), strength=0.5).of(context, question)
    scores = rewards_of(context, Brightness(), question.rolled.x0)
    assert attract.argsort().tolist() == scores.argsort().tolist()
    assert sorted(attract.tolist()) == pytest.approx(np.linspace(0.5, 1.5, 9).tolist())
    torch.testing.assert_close(attract + repel, torch.full((9,), 2.0))
    plain = RewardRank(Brightness(), strength=0.0).of(context, question)
    assert all((weight == 1.0).all() for weight in plain)


def test_a_tilt_weighs_exponentially_and_alike() -> None:
    context = exact_context(visible_setting(), count=9)
    question = context.question(LAST, Renoise(), TauLaw())
    scores = rewards_of(context, Brightness(), question.rolled.x0).detach()
    attract, repel = RewardTilt(Brightness(), beta=0.5, baseline=1.0).of(context, question)
    torch.testing.assert_close(attract, ((scores - 1.0) / 0.5).exp().clamp(max=10.0))
    assert torch.equal(attract, repel)
    assert RewardTilt(Brightness(), beta=1e-3, most=3.0).of(context, question)[0].max() <= 3.0


def test_weights_scale_the_gradient_of_each_sample() -> None:
    context = exact_context(visible_setting(), count=8)
    tilt = RewardTilt(Brightness(), beta=1.0, baseline=1.5)
    plain = ScoreDifference(LAST, Guided())
    weighted = dataclasses.replace(plain, weights=(tilt,))
    question = context.question(LAST, Renoise(), TauLaw(), "dm")
    question.rolled.x0.retain_grad()
    found = []
    for term in (plain, weighted):
        (grad,) = torch.autograd.grad(term.loss(context)[0], question.rolled.x0, retain_graph=True)
        found.append(grad)
    factor = tilt.of(context, question)[0].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found[1], factor * found[0])


def test_the_pseudo_huber_pull_bounds_every_value() -> None:
    x0 = torch.zeros(2, 4, 1, 1, requires_grad=True)
    gradient = torch.tensor([1e-6, 1e-3, 1.0, -50.0]).repeat(2, 1).reshape(2, 4, 1, 1)
    scale = torch.full((2, 1, 1, 1), 0.5)
    HuberPull(1e-3).loss(x0, gradient, scale).backward()
    assert x0.grad is not None
    expected = gradient / (gradient.square() + 1e-6).sqrt() / scale / x0.numel()
    torch.testing.assert_close(x0.grad, expected)
    x0.grad = None
    SquaredPull().loss(x0, gradient, scale).backward()
    torch.testing.assert_close(x0.grad, gradient / scale / x0.numel())
