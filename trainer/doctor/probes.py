"""What the teacher tells before a run: its guidance, its trajectory, its latents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import Level
from fewstep.trainer.components.grids import even_path
from fewstep.trainer.context import Setting
from fewstep.trainer.draws import Draws
from fewstep.trainer.generate import generate, one_speaker
from fewstep.trainer.levels import levels_at
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.roles import Role

NUM_IMAGES = 16
MANY_STEPS = 32
POSITIONS = tuple(i / 10 for i in range(1, 10))
HARM = 1.05
"""Guidance harms where the guided prediction is this much farther from the truth."""


@dataclass(frozen=True, slots=True)
class GuidanceRow:
    """Guidance at one noise level.

    Attributes:
        position: Of the clock, 0 clean to 1 noise.
        cond_error: rms of (conditional x0 - truth), truth being the teacher's own samples.
        guided_error: rms of (guided x0 - truth).
    """

    position: float
    cond_error: float
    guided_error: float

    @property
    def harm(self) -> float:
        """Above 1 guidance leads away from what the teacher draws."""
        return self.guided_error / max(self.cond_error, 1e-12)


def seeds() -> range:
    """Image seeds of all probes."""
    return range(400_000_000, 400_000_000 + NUM_IMAGES)


def prompts(setting: Setting) -> list[int]:
    """Prompts of all probes, in turn."""
    return [i % len(setting.book.prompts) for i in range(NUM_IMAGES)]


def teacher_latents(setting: Setting, frame: Frame, num_steps: int) -> Tensor:
    """The guided teacher on an even grid, shape (N, C, h, w)."""
    path = even_path(frame.schedule, num_steps, shift=frame.config.grid.shift)
    return generate(
        setting,
        path,
        speaker=one_speaker(Role.TEACHER),
        guidance_scale=frame.guidance_scale,
        prompts=prompts(setting),
        seeds=seeds(),
    )


@torch.no_grad()
def guidance_probe(setting: Setting, frame: Frame, truth: Tensor) -> list[GuidanceRow]:
    """Error of guided and unguided predictions against the teacher's own samples, by noise level.

    Source:
        The idea behind 1.x-Distill's gate: guidance that leads away from x0 at high noise locks
        the student to few modes.
    """
    backbone, rows = setting.backbone, []
    condition = setting.book.take(torch.tensor(prompts(setting)))
    draws = Draws(0, 0, 0, range(len(truth)), backbone.device)
    for position in POSITIONS:
        levels = levels_at(
            backbone.schedule, torch.full((len(truth),), position, dtype=torch.float64)
        )
        levels = levels.like(truth)
        epsilon = draws.normal(f"guidance/{position}", tuple(truth.shape[1:]))
        sample = sampling.add_noise(truth, epsilon, levels)
        cond, uncond = backbone.both_x0(
            Role.TEACHER, sample, levels, condition, setting.book.null_condition
        )
        guided = uncond + frame.guidance_scale * (cond - uncond)
        rows.append(GuidanceRow(position, _rms(cond - truth), _rms(guided - truth)))
    return rows


def proposed_gate(rows: list[GuidanceRow]) -> float | None:
    """Highest position below which guidance does no harm; None where it never does."""
    harmful = [row.position for row in rows if row.harm > HARM]
    if not harmful:
        return None
    safe = [row.position for row in rows if row.position < min(harmful)]
    return max(safe, default=0.0)


@torch.no_grad()
def bends(setting: Setting, frame: Frame) -> tuple[list[Level], list[float]]:
    """Levels of a fine teacher trajectory and how much it bends at each.

    The bend at level i is the rms of the change of predicted x0 since the level before: a straight
    path predicts the same x0 everywhere.
    """
    backbone = setting.backbone
    fine = even_path(frame.schedule, MANY_STEPS, shift=frame.config.grid.shift)
    condition = setting.book.take(torch.tensor(prompts(setting)))
    start = Draws(0, 0, 0, range(NUM_IMAGES), backbone.device).normal("bends", setting.shapes[0])
    sample, before, found = fine.levels[0].sigma * start, None, []
    for index, level in enumerate(fine.levels[:-1]):
        x0 = backbone.guided_x0(
            Role.TEACHER,
            sample,
            backbone.level_batch(level, NUM_IMAGES),
            condition,
            setting.book.null_condition,
            frame.guidance_scale,
        )
        found.append(0.0 if before is None else _rms(x0 - before))
        before = x0
        sample = fine.advance(sample, x0, index, None)
    return list(fine.levels[:-1]), found


def proposed_timesteps(levels: list[Level], bend: list[float], num_steps: int) -> tuple[float, ...]:
    """A grid whose steps bend alike: equal parts of the trajectory's total bend.

    Args:
        levels: Of the fine trajectory, falling.
        bend: At each of them.
        num_steps: Of the student.
    """
    total = sum(bend)
    if total == 0.0:
        return tuple(levels[i * len(levels) // num_steps].timestep for i in range(num_steps))
    chosen, spent, wanted = [levels[0].timestep], 0.0, total / num_steps
    for level, share in zip(levels[1:], bend[1:], strict=True):
        spent += share
        if spent >= wanted * len(chosen) and len(chosen) < num_steps:
            chosen.append(level.timestep)
    while len(chosen) < num_steps:  # a path that bends at one place only: halve the last step
        chosen.append(chosen[-1] / 2.0)
    return tuple(chosen)


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())
