"""Teacher pairs: noise, and where the guided teacher's ODE takes it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.noise import NoiseBatch
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.components.preparation import Preparation
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import Setting, StepContext
from fewstep.trainer.generate import generate, one_speaker
from fewstep.trainer.roles import Role

PAIR_SEED = 700_000_000
"""First image seed of pairs; evaluations and sample grids use others."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Some pairs.

    Attributes:
        noise: Standard normal, shape (B, C, h, w).
        x0: The end of the teacher's trajectory from it, shape (B, C, h, w).
        prompt: Under which prompt of the book, shape (B,), on the CPU.
    """

    noise: Tensor
    x0: Tensor
    prompt: Tensor

    def take(self, index: Tensor) -> "Pairs":
        """The pairs at `index`, shape (B,)."""
        return Pairs(self.noise[index], self.x0[index], self.prompt[index])


class TeacherPairs(Preparation):
    """Pairs made once, on prompts spread evenly over the book and on fixed seeds; kept on the CPU.

    Args:
        count: How many.
        path: The teacher's grid.
        guidance_scale: The teacher's w.
    """

    def __init__(self, count: int, path: StudentPath, guidance_scale: float) -> None:
        self.count = count
        self.path = path
        self.guidance_scale = guidance_scale
        self._all: Pairs | None = None

    @property
    def all(self) -> Pairs:
        """Every pair."""
        assert self._all is not None  # the stage that uses them prepares them
        return self._all

    def prepare(self, setting: Setting) -> None:
        prompts = [i * len(setting.book.prompts) // self.count for i in range(self.count)]
        seeds = range(PAIR_SEED, PAIR_SEED + self.count)
        x0 = generate(
            setting,
            self.path,
            speaker=one_speaker(Role.TEACHER),
            guidance_scale=self.guidance_scale,
            prompts=prompts,
            seeds=seeds,
        )
        noise = torch.from_numpy(NoiseBatch(list(seeds)).draw(setting.shapes[0]))
        self._all = Pairs(noise, x0.cpu(), torch.tensor(prompts))


@dataclass(frozen=True, slots=True)
class PairRegression(Term):
    """The student's one step from a pair's noise must give the pair's picture.

        mean (x0_student - x0_teacher)^2

    Attributes:
        pairs: Prepared by the stage.
        path: The student's grid of one step.

    Source:
        Yin et al. 2023 (DMD), arXiv:2311.18828, eq. 9; squared error of latents instead of LPIPS.
    """

    pairs: TeacherPairs
    path: StudentPath

    def loss(self, context: StepContext) -> TermLoss:
        pairs = self.pairs.all.take(context.draws.integers("pairs", self.pairs.count))
        device, level = context.draws.device, self.path.levels[0]
        x0 = context.backbone.x0(
            context.student(level),
            level.sigma * pairs.noise.to(device),
            context.levels(level),
            context.setting.book.take(pairs.prompt),
        )
        loss = functional.mse_loss(x0, pairs.x0.to(device))
        return loss, {"loss/pairs": loss.item()}
