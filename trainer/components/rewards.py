"""Rewards: a differentiable score of decoded pictures, and what a student makes of it.

A reward never stands alone: beside distribution matching, which keeps the student near the teacher
(DMDR), or as a weight of that gradient (AMD, Re-DMD).
"""

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.signals import GradientWeight
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import Question, StepContext


class Reward(ABC):
    """Interface: how good pictures are for their prompts."""

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores, more is better.

        Args:
            images: Shape (B, 3, H, W), float32, 0 to 1; may carry a gradient.
            prompts: B texts.

        Returns:
            Shape (B,), float32, differentiable in the pictures.
        """


class DigitsReward(Reward):
    """Logit of the digit that was asked for, by the classifier that judges the digits teachers.

    Raises:
        ConfigError: The classifier's file is missing.
    """

    def __init__(self) -> None:
        from fewstep.digits.data import all_prompts
        from fewstep.digits.judge import CLASSIFIER_FILE, load_classifier

        self._classifier = load_classifier(CLASSIFIER_FILE).requires_grad_(False)
        self._digit_of = dict(all_prompts())

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        unknown = [text for text in prompts if text not in self._digit_of]
        if unknown:
            raise ConfigError(
                f"the digits reward does not know which digit {unknown[0]!r} asks for; use the "
                "digits teachers' own prompts"
            )
        digits = torch.tensor([self._digit_of[text] for text in prompts], device=images.device)
        logits = self._classifier.to(images.device)(images * 2.0 - 1.0)
        return logits.gather(1, digits[:, None])[:, 0]


class ProgramReward(Reward):
    """A program saved with `torch.export.save`: pictures in, one number per picture out.

    It is loaded without the Python classes it was made from. Export it with a dynamic batch, for
    pictures (B, 3, H, W) of 0 to 1 in the run's size: `torch.export.export(model, (images,),
    dynamic_shapes=({0: torch.export.Dim("batch")},))`. Prompts are not passed to it.

    Args:
        file: A `.pt2` file.

    Raises:
        ConfigError: There is no such program.
    """

    def __init__(self, file: Path) -> None:
        if file.suffix != ".pt2" or not zipfile.is_zipfile(file):
            raise ConfigError(
                f"{file} is no program of torch.export (.pt2); save the reward with "
                "torch.export.save (TorchScript files are not read)"
            )
        self._file = file
        self._program = torch.export.load(file).module()
        for parameter in self._program.parameters():
            parameter.requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            scores = self._program.to(images.device)(images)
        except (AssertionError, RuntimeError) as error:  # its guards: of shape, type and device
            raise ConfigError(
                f"{self._file} cannot score pictures of shape {tuple(images.shape)} ({error}); "
                "export it for this size, with a dynamic batch"
            ) from error
        if not isinstance(scores, Tensor) or scores.numel() != len(images):
            raise ConfigError(
                f"{self._file} does not return one number per picture; export a program that does"
            )
        return scores.float().reshape(-1)


BUILT_IN: dict[str, Callable[[], Reward]] = {"digits": DigitsReward}


def reward_named(name: str) -> Reward:
    """The reward of a setting: `digits`, or the path of a `.pt2` program.

    Raises:
        ConfigError: Neither.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if not Path(name).is_file():
        raise ConfigError(
            f"reward {name!r} is neither {', '.join(BUILT_IN)} nor a file; pass the path of a "
            ".pt2 program"
        )
    return ProgramReward(Path(name))


def rewards_of(
    context: StepContext, reward: Reward, x0: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Scores of predicted clean latents; of clips the mean over their frames.

    Args:
        context: The update, for its prompts.
        reward: Who scores.
        x0: Shape (B, ...), one per prompt of the update.
        rows: Which of them to decode and score, (R,) of integers; None scores all.

    Returns:
        Shape (B,) or (R,).
    """
    prompts = context.prompt if rows is None else context.prompt[rows.to(context.prompt.device)]
    images = context.backbone.decode_float(x0 if rows is None else x0[rows])
    texts = [context.setting.book.prompts[i] for i in prompts.tolist()]
    if images.ndim == 4:
        return reward.score(images, texts)
    frames = images.movedim(2, 1)
    scores = reward.score(frames.flatten(0, 1), [t for t in texts for _ in range(frames.shape[1])])
    return scores.reshape(len(texts), -1).mean(1)


@dataclass(frozen=True, slots=True)
class RewardTerm(Term):
    """The student climbs the reward through the decoder: loss = -mean reward(decode(x0)).

    Attributes:
        rollout: Where the student is asked; the one distribution matching has costs no call more.
        reward: What is climbed.
        share: Part of the samples that is decoded; decoders cost more than denoisers at times.

    Source:
        ReFL inside DMDR, arXiv:2511.13649.
    """

    rollout: Rollout
    reward: Reward
    share: float = 1.0

    def loss(self, context: StepContext) -> TermLoss:
        x0 = context.rolled(self.rollout).x0
        rows = (context.draws.uniform("reward") < self.share).nonzero().flatten()
        if len(rows) == 0:  # where a base is cut, all processes must go backward through it
            none = x0[:0].sum() if context.backbone.in_step else torch.zeros((), device=x0.device)
            return none, {}
        scores = rewards_of(context, self.reward, x0, rows)
        # by the expected count, so that parts of a batch add up to the whole
        loss = -scores.sum() / (self.share * len(x0))
        return loss, {"reward/mean": scores.mean().item()}


@dataclass(frozen=True, slots=True)
class RewardRank(GradientWeight):
    """Good samples are pulled to the teacher more, bad ones pushed off the critic more.

        attract = 1 + strength * rank,   repel = 1 - strength * rank

    with ranks evenly from -1 (worst) to 1 (best) among the samples of one part of a batch, so both
    have mean 1.

    Attributes:
        reward: What ranks.
        strength: 0 (no weights) to 1.

    Source:
        AMD, arXiv:2602.07345, where a group-relative advantage takes the place of the rank.
    """

    reward: Reward
    strength: float = 0.5

    def of(self, context: StepContext, question: Question) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores = rewards_of(context, self.reward, question.rolled.x0)
        places = scores.argsort().argsort().float()
        rank = 2.0 * places / max(1, len(places) - 1) - 1.0 if len(places) > 1 else 0.0 * places
        return 1.0 + self.strength * rank, 1.0 - self.strength * rank


@dataclass(frozen=True, slots=True)
class RewardTilt(GradientWeight):
    """The whole gradient of a sample counts exp((reward - baseline) / beta).

    Attributes:
        reward: What weighs.
        beta: Temperature, above 0.
        baseline: The reward whose weight is 1.
        most: Largest weight.

    Source:
        Re-DMD in Reward Forcing, arXiv:2512.04678.
    """

    reward: Reward
    beta: float
    baseline: float = 0.0
    most: float = 10.0

    def of(self, context: StepContext, question: Question) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores = rewards_of(context, self.reward, question.rolled.x0)
            weight = ((scores - self.baseline) / self.beta).exp().clamp(max=self.most)
        return weight, weight
