"""The two stages of a run: trajectory warm start, then distribution matching.

A stage gives losses for draws; who is updated when is decided in the loop.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import sampling
from fewstep.noise_schedule import Level
from fewstep.trainer import losses
from fewstep.trainer.backbone import Backbone, Condition
from fewstep.trainer.levels import Levels, levels_at, output_weight
from fewstep.trainer.prompts import PromptBook
from fewstep.trainer.roles import Role
from fewstep.trainer.rollout import Draws, StudentPath, roll_out

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """What every stage works with.

    Attributes:
        backbone: The base with its adapters.
        book: Prompts.
        path: The student's grid.
        guidance_scale: The teacher's w, distilled into the student.
    """

    backbone: Backbone
    book: PromptBook
    path: StudentPath
    guidance_scale: float

    def condition(self, draws: Draws) -> Condition:
        """Embeddings of the drawn prompts."""
        return self.book.conditions.take(draws.prompt)

    @torch.no_grad()
    def teacher_x0(self, sample: Tensor, levels: Levels, condition: Condition) -> Tensor:
        """The guided teacher."""
        return self.backbone.guided_x0(
            Role.TEACHER, sample, levels, condition, self.book.null_condition, self.guidance_scale
        )


class Stage(ABC):
    """Interface: losses of one stage."""

    @abstractmethod
    def student_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """Loss of the student and what to log."""


class TrajectoryStage(Stage):
    """Student steps reach where several teacher steps would.

    From the student's own sample at a random grid step, the teacher integrates its guided ODE to
    the next grid point in `teacher_substeps` steps; the student's single step must arrive there.

    Source:
        Zhou et al. 2024 (SFD), arXiv:2409.19681; one random step per update instead of all.
    """

    def __init__(self, setting: Setting, teacher_substeps: int) -> None:
        self.setting = setting
        self.teacher_substeps = teacher_substeps

    def student_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        setting, path = self.setting, self.setting.path
        condition = setting.condition(draws)
        rollout = roll_out(setting.backbone, path, draws, condition, with_grad=True)
        now, following = path.levels[rollout.index], path.levels[rollout.index + 1]
        reached = sampling.step(rollout.sample, rollout.x0, now, following, None, following)
        target = self._teacher_end(rollout.sample, now, following, condition)
        loss = losses.trajectory_loss(reached, target, rollout.sample)
        return loss, {"loss/trajectory": loss.item()}

    @torch.no_grad()
    def _teacher_end(
        self, sample: Tensor, now: Level, following: Level, condition: Condition
    ) -> Tensor:
        stops = substeps(self.setting.path, now, following, self.teacher_substeps)
        for here, there in zip(stops, stops[1:], strict=False):
            levels = self.setting.backbone.level_batch(here, len(sample))
            x0 = self.setting.teacher_x0(sample, levels, condition)
            sample = sampling.step(sample, x0, here, there, None, there)
        return sample


def substeps(path: StudentPath, now: Level, following: Level, count: int) -> list[Level]:
    """`count` + 1 levels from `now` to `following`, evenly spaced on the schedule's clock."""
    width = (now.timestep - following.timestep) / count
    inner = [path.schedule.level(now.timestep - i * width) for i in range(1, count)]
    return [now, *inner, following]


class DmdStage(Stage):
    """DMD2 with backward simulation, data-free: teacher and critic compare the student's output.

    Source:
        Yin et al. 2023, arXiv:2311.18828; Yin et al. 2024 (DMD2), arXiv:2405.14867.
    """

    def __init__(self, setting: Setting, normaliser_floor: float) -> None:
        self.setting = setting
        self.normaliser_floor = normaliser_floor

    def student_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        setting = self.setting
        condition = setting.condition(draws)
        rollout = roll_out(setting.backbone, setting.path, draws, condition, with_grad=True)
        levels = levels_at(setting.backbone.schedule, draws.position)
        with torch.no_grad():
            sample = sampling.add_noise(rollout.x0, draws.epsilon, levels)
            teacher = setting.teacher_x0(sample, levels, condition)
            critic = setting.backbone.x0(Role.CRITIC, sample, levels, condition)
        matched = losses.dmd_gradient(rollout.x0, teacher, critic, self.normaliser_floor)
        loss = losses.surrogate_loss(rollout.x0, matched.gradient)
        return loss, {
            "loss/dmd": loss.item(),
            "health/dm_cos": matched.cosine,
            "health/dm_rel_gap": matched.relative_gap,
        }

    def critic_loss(self, draws: Draws) -> tuple[Tensor, Metrics]:
        """The critic learns to denoise what the student draws now."""
        setting = self.setting
        condition = setting.condition(draws)
        rollout = roll_out(setting.backbone, setting.path, draws, condition, with_grad=False)
        levels = levels_at(setting.backbone.schedule, draws.position)
        sample = sampling.add_noise(rollout.x0, draws.epsilon, levels)
        critic = setting.backbone.x0(Role.CRITIC, sample, levels, condition)
        weight = output_weight(setting.backbone.prediction, levels)
        loss = losses.denoising_loss(critic, rollout.x0, weight)
        return loss, {"loss/critic": loss.item()}
