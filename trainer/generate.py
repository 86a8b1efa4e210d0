"""Samples during a run, without building a pipeline: fixed seeds, any role, any grid."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.noise import NoiseBatch
from fewstep.noise_schedule import Level
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.components.sizes import enlarged, shape_at
from fewstep.trainer.context import Setting
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import ConditionRoute, Route
from fewstep.trajectory import plain_steps, sample_trajectory

BATCH = 100
Speaker = Callable[[Level, int], Role]
"""(level, prompt index) -> who answers; all prompts of a batch must give the same."""


def one_speaker(role: Role) -> Speaker:
    """The same role everywhere."""
    return lambda level, prompt: role


def student_speaker(route: Route, role: Role) -> Speaker:
    """The route's student at each level, as `role` (the students or their averages)."""

    def speak(level: Level, prompt: int) -> Role:
        expert = None
        if isinstance(route, ConditionRoute):
            expert = next(k for k, group in enumerate(route.groups) if prompt in group)
        student = route.student(level, expert)
        return Role(student.name.replace(Role.STUDENT.name, role.name))

    return speak


@torch.no_grad()
def generate(
    setting: Setting,
    path: StudentPath,
    *,
    speaker: Speaker,
    guidance_scale: float,
    prompts: Sequence[int],
    seeds: Sequence[int],
) -> Tensor:
    """Latents of some prompts: image i depends on its own seed only.

    Args:
        setting: Base and cached prompts.
        path: Grid and stochasticity.
        speaker: Who answers.
        guidance_scale: 1 for the student, the teacher's own for the teacher.
        prompts: Indices into the book, one per image.
        seeds: One per image.

    Returns:
        Shape (N, C, h, w), float32.
    """
    # samples of one batch share a speaker: group by who answers on the grid's first level
    groups: dict[Role, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(speaker(path.levels[0], prompt), []).append(index)
    done: dict[int, Tensor] = {}
    for members in groups.values():
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            batch = _one_batch(
                setting,
                path,
                speaker,
                guidance_scale,
                [prompts[i] for i in part],
                [seeds[i] for i in part],
            )
            done |= dict(zip(part, batch, strict=True))
    return torch.stack([done[i] for i in range(len(prompts))])


def _one_batch(
    setting: Setting,
    path: StudentPath,
    speaker: Speaker,
    guidance_scale: float,
    prompts: list[int],
    seeds: list[int],
) -> Tensor:
    backbone = setting.backbone
    condition = setting.book.take(torch.tensor(prompts))
    null_condition = setting.book.null_condition
    noise = NoiseBatch(seeds)

    def draw(size: float) -> Tensor:
        shape = shape_at(setting.shapes[0], size)
        return torch.from_numpy(noise.draw(shape)).to(backbone.device)

    def resize(x0: Tensor, size: float) -> Tensor:
        return enlarged(x0, shape_at(setting.shapes[0], size))

    def denoise(sample: Tensor, level: Level) -> Tensor:
        return backbone.guided_x0(
            speaker(level, prompts[0]),
            sample,
            backbone.level_batch(level, len(sample)),
            condition,
            null_condition,
            guidance_scale,
        )

    steps = [
        dataclasses.replace(step, size=path.size(i), following_size=path.size(i + 1))
        for i, step in enumerate(plain_steps(path.levels, path.schedule, path.stochasticity))
    ]
    start = path.levels[0].sigma * draw(path.size(0))
    return sample_trajectory(denoise, start, steps, draw=draw, resize=resize)
