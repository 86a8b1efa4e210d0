"""Rollouts: the student samples its own trajectory (backward simulation), without any data.

A step's randomness is drawn for the whole batch at once (`draw`), then cut into parts, so that
gradient accumulation sees exactly what a large batch would.

Source:
    Yin et al. 2024 (DMD2), arXiv:2405.14867, section 4.5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import Level, NoiseSchedule
from fewstep.trainer.backbone import Backbone, Condition
from fewstep.trainer.prompts import PromptBook
from fewstep.trainer.roles import Role


@dataclass(frozen=True, slots=True)
class TauLaw:
    """Where on the schedule (0 clean, 1 noise) teacher and critic are asked: uniform, shifted.

    Attributes:
        low: Lowest position before the shift.
        high: Highest.
        shift: Above 1 moves positions toward noise.
    """

    low: float
    high: float
    shift: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Positions, shape (count,)."""
        even = self.low + (self.high - self.low) * torch.rand(count, generator=generator)
        return self.shift * even / (1.0 + (self.shift - 1.0) * even)


@dataclass(frozen=True, slots=True)
class Draws:
    """Everything random in one optimizer step.

    Attributes:
        prompt: Prompt indices, shape (B,).
        noise: Initial noise and one draw per re-noising step, shape (1 + steps, B, C, h, w).
        exit_index: Grid step at which the rollout stops.
        position: Where on the schedule teacher and critic are asked, 0 to 1, shape (B,).
        epsilon: Noise of that question, shape (B, C, h, w).
    """

    prompt: Tensor
    noise: Tensor
    exit_index: int
    position: Tensor
    epsilon: Tensor

    def split(self, parts: int) -> list["Draws"]:
        """The same draws as `parts` equal batches."""
        return [
            Draws(prompt, noise, self.exit_index, position, epsilon)
            for prompt, noise, position, epsilon in zip(
                self.prompt.chunk(parts),
                self.noise.chunk(parts, dim=1),
                self.position.chunk(parts),
                self.epsilon.chunk(parts),
                strict=True,
            )
        ]


@dataclass(frozen=True, slots=True)
class Rollout:
    """Where a student trajectory stopped.

    Attributes:
        sample: The student's input at the exit step, shape (B, C, h, w), no gradient.
        x0: Its prediction there, float32; carries the gradient if one was asked for.
        index: The exit step.
        noise: Fresh noise for the step that leaves `sample`, shape (B, C, h, w), or None.
    """

    sample: Tensor
    x0: Tensor
    index: int
    noise: Tensor | None


@dataclass(frozen=True, slots=True)
class StudentPath:
    """The student's grid: what is trained is what the recipe stores.

    Attributes:
        levels: N + 1 levels.
        schedule: Of the base.
        stochasticity: 0 ODE steps, 1 re-noising.
    """

    levels: tuple[Level, ...]
    schedule: NoiseSchedule
    stochasticity: float

    @property
    def num_steps(self) -> int:
        """Student steps."""
        return len(self.levels) - 1

    def advance(self, sample: Tensor, x0: Tensor, index: int, noise: Tensor | None) -> Tensor:
        """One grid step with the one step function."""
        now, following = self.levels[index], self.levels[index + 1]
        via = self.schedule.via(following, self.stochasticity)
        return sampling.step(sample, x0, now, following, noise, via)


def draw(
    book: PromptBook,
    path: StudentPath,
    shape: tuple[int, int, int],
    batch_size: int,
    *,
    tau: TauLaw,
    is_last_exit: bool = False,
    generator: torch.Generator,
    device: torch.device,
) -> Draws:
    """Draw one optimizer step's randomness from the run's CPU generator.

    Args:
        book: Prompts to draw from.
        path: The student's grid.
        shape: Latent shape (C, h, w).
        batch_size: B.
        tau: Where teacher and critic will be asked.
        is_last_exit: Stop at the last step, the picture, instead of at a random one.
        generator: The run's generator, on the CPU.
        device: Where the tensors go.
    """
    prompt = book.draw(batch_size, generator)
    draws = path.num_steps if path.stochasticity > 0.0 else 1
    noise = torch.randn((draws, batch_size, *shape), generator=generator)
    lowest_exit = path.num_steps - 1 if is_last_exit else 0
    exit_index = int(torch.randint(lowest_exit, path.num_steps, (), generator=generator))
    position = tau.draw(batch_size, generator)
    epsilon = torch.randn((batch_size, *shape), generator=generator)
    return Draws(prompt, noise.to(device), exit_index, position.to(device), epsilon.to(device))


def roll_out(
    backbone: Backbone, path: StudentPath, draws: Draws, condition: Condition, *, with_grad: bool
) -> Rollout:
    """Run the student from noise to the exit step; only the last call may carry a gradient."""
    first = path.levels[0]
    sample = first.sigma * draws.noise[0]
    for index in range(draws.exit_index + 1):
        is_exit = index == draws.exit_index
        levels = backbone.level_batch(path.levels[index], len(sample))
        with torch.set_grad_enabled(with_grad and is_exit):
            x0 = backbone.x0(Role.STUDENT, sample, levels, condition)
        noise = draws.noise[index + 1] if index + 1 < len(draws.noise) else None
        if is_exit:
            return Rollout(sample, x0, index, noise)
        sample = path.advance(sample, x0, index, noise)
    raise AssertionError("the exit step is on the grid")
