"""Samples during a run, without building a pipeline: fixed seeds, any role, any grid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.noise import NoiseBatch
from fewstep.noise_schedule import Flow, Level, levels_of
from fewstep.trainer.backbone import Backbone, Condition
from fewstep.trainer.prompts import PromptBook
from fewstep.trainer.roles import Role
from fewstep.trainer.rollout import StudentPath
from fewstep.trajectory import plain_steps, sample_trajectory

BATCH = 100


def even_levels(backbone: Backbone, num_steps: int, shift: float = 1.0) -> tuple[Level, ...]:
    """The evenly spaced grid of a schedule, shifted once for flow, ending at clean data."""
    schedule = backbone.schedule
    if isinstance(schedule, Flow):
        schedule = Flow(shift, schedule.num_train_timesteps)
    timesteps = schedule.uniform_timesteps(num_steps)
    sigmas = [schedule.sigma_of_timestep(t) for t in timesteps]
    return levels_of(schedule, timesteps, [*sigmas, 0.0])


@torch.no_grad()
def generate(
    backbone: Backbone,
    book: PromptBook,
    path: StudentPath,
    *,
    role: Role,
    guidance_scale: float,
    prompts: Sequence[int],
    seeds: Sequence[int],
    shape: tuple[int, int, int],
) -> Tensor:
    """Latents of some prompts: image i depends on its own seed only.

    Args:
        backbone: The base with its adapters.
        book: Cached prompts.
        path: Grid and stochasticity.
        role: Whose adapter.
        guidance_scale: 1 for the student, the teacher's own for the teacher.
        prompts: Indices into the book, one per image.
        seeds: One per image.
        shape: Latent shape (C, h, w).

    Returns:
        Shape (N, C, h, w), float32.
    """
    done = []
    for start in range(0, len(seeds), BATCH):
        chosen = torch.tensor(prompts[start : start + BATCH])
        condition = book.conditions.take(chosen)
        noise = NoiseBatch(seeds[start : start + BATCH])
        done.append(_one_batch(backbone, book, path, role, guidance_scale, condition, noise, shape))
    return torch.cat(done)


def _one_batch(
    backbone: Backbone,
    book: PromptBook,
    path: StudentPath,
    role: Role,
    guidance_scale: float,
    condition: Condition,
    noise: NoiseBatch,
    shape: tuple[int, int, int],
) -> Tensor:
    def draw(_: float = 1.0) -> Tensor:
        return torch.from_numpy(noise.draw(shape)).to(backbone.device)

    def denoise(sample: Tensor, level: Level) -> Tensor:
        levels = backbone.level_batch(level, len(sample))
        return backbone.guided_x0(
            role, sample, levels, condition, book.null_condition, guidance_scale
        )

    steps = plain_steps(path.levels, path.schedule, path.stochasticity)
    return sample_trajectory(denoise, path.levels[0].sigma * draw(), steps, draw=draw)
