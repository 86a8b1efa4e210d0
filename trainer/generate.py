"""Samples during a run, without building a pipeline: fixed seeds, any role, any grid."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.heads.two_time import target_time
from fewstep.noise import NoiseBatch
from fewstep.noise_schedule import Level
from fewstep.trainer.components.grids import StudentPath
from fewstep.trainer.components.sizes import enlarged, shape_at
from fewstep.trainer.context import Setting
from fewstep.trainer.parallel import summed
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

    Several processes draw a part each and all get the whole.

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
    processes, device = setting.processes, setting.backbone.device
    latents = torch.zeros((len(prompts), *setting.shapes[0]), device=device)
    for members in groups.values():
        for start in range(0, len(members), BATCH * processes.size):
            batch = members[start : start + BATCH * processes.size]
            part = processes.share(batch)
            counted = setting.backbone.evaluations.copy()
            drawn = _one_batch(
                setting,
                path,
                speaker,
                guidance_scale,
                # the last few may be fewer than processes, and all must make the same calls
                [prompts[i] for i in part or batch[:1]],
                [seeds[i] for i in part or batch[:1]],
            )
            if part:
                latents[part] = drawn
            else:
                setting.backbone.evaluations = counted
    # zeros where another process drew
    return summed(latents) if processes.size > 1 else latents


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

    ends = dict(zip(path.levels, path.levels[1:], strict=False))

    def denoise(sample: Tensor, level: Level) -> Tensor:
        now = backbone.level_batch(level, len(sample))
        end = torch.tensor([ends[level].timestep], device=backbone.device)
        with target_time(end, now.timestep):  # heard by two-time students only
            return backbone.guided_x0(
                speaker(level, prompts[0]),
                sample,
                now,
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
