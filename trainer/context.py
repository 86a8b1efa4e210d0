"""One (part of an) update as terms see it: prompts, rollouts and probes, each made once."""

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.heads.two_time import target_time
from fewstep.noise_schedule import Level
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.grids import GridLaw
from fewstep.trainer.components.kernels import Kernel, Noised
from fewstep.trainer.components.probe import Probe
from fewstep.trainer.components.rollouts import Rolled, Rollout
from fewstep.trainer.components.sizes import shape_at
from fewstep.trainer.components.taus import TauLaw
from fewstep.trainer.data.latent_book import LatentBook
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.draws import Draws
from fewstep.trainer.levels import Levels
from fewstep.trainer.parallel import Processes
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import Route


@dataclass(frozen=True, slots=True)
class Setting:
    """What a whole run works with.

    Attributes:
        backbone: The base.
        cast: Everybody's parameters on it.
        book: Prompts.
        latents: Real data, or None.
        shapes: Latent shapes (C, h, w) that prompts-only rollouts draw from.
        route: Which student answers where.
        processes: This one among its peers.
    """

    backbone: Backbone
    cast: Cast
    book: PromptBook
    latents: LatentBook | None
    shapes: tuple[tuple[int, ...], ...]
    route: Route
    processes: Processes = Processes()


@dataclass(frozen=True, slots=True)
class Real:
    """Real latents of an update.

    Attributes:
        x0: Shape (B, C, h, w), float32.
        prompt: Their prompts, shape (B,).
    """

    x0: Tensor
    prompt: Tensor


@dataclass(frozen=True, slots=True)
class Question:
    """A probe and how it came about.

    Attributes:
        probe: Who is asked what.
        noised: The noisy sample, with the student's gradient where there is one.
        rolled: The rollout behind it.
    """

    probe: Probe
    noised: Noised
    rolled: Rolled


class StepContext:
    """What terms share during one update.

    Args:
        setting: The run's.
        draws: Randomness of this part.
        progress: Share of the stage done, 0 to 1.
        expert: Which student of the route is trained; None without experts.
        with_grad: Whether rollouts end with a gradient of the student.
        uses_data: Whether prompts are those of real latents.
    """

    def __init__(
        self,
        setting: Setting,
        draws: Draws,
        *,
        progress: float,
        expert: int | None,
        with_grad: bool,
        uses_data: bool,
    ) -> None:
        self.setting = setting
        self.draws = draws
        self.progress = progress
        self.expert = expert
        self.with_grad = with_grad
        self.uses_data = uses_data
        self.prompt, self.shape, self._real = self._batch()
        self.condition: Condition = setting.book.take(self.prompt)
        self._rolled: dict[Rollout, Rolled] = {}
        self._walks: dict[tuple[GridLaw, str], list[Tensor]] = {}
        self._questions: dict[tuple[Rollout, Kernel, TauLaw, str], Question] = {}
        self._made: dict[Hashable, Tensor] = {}

    def _batch(self) -> tuple[Tensor, tuple[int, ...], Real | None]:
        setting, draws = self.setting, self.draws
        if not self.uses_data:
            shape = setting.shapes[draws.shared_integer("shape", 0, len(setting.shapes))]
            return setting.route.draw_prompts(setting.book, draws, self.expert), shape, None
        assert setting.latents is not None  # checked before the run starts
        bucket = setting.latents.draw_bucket(draws.shared("bucket"))
        index = draws.integers("real", setting.latents.sizes[bucket])
        x0, prompt = setting.latents.take(bucket, index)
        real = Real(x0.to(draws.device), prompt)
        return prompt, tuple(x0.shape[1:]), real

    @property
    def backbone(self) -> Backbone:
        """The base."""
        return self.setting.backbone

    @property
    def null_condition(self) -> Condition:
        """The empty prompt, one row."""
        return self.setting.book.null_condition

    @property
    def real(self) -> Real:
        """Real latents with the update's prompts."""
        assert self._real is not None  # a stage that uses data says so, and the validator checks
        return self._real

    def without_grad(self) -> "StepContext":
        """The same update, rolled out without gradient; only walks are shared with this one."""
        same = StepContext(
            self.setting,
            self.draws,
            progress=self.progress,
            expert=self.expert,
            with_grad=False,
            uses_data=self.uses_data,
        )
        same._walks = self._walks
        return same

    def part(self, draws: Draws) -> "StepContext":
        """The same update on other samples."""
        return StepContext(
            self.setting,
            draws,
            progress=self.progress,
            expert=self.expert,
            with_grad=self.with_grad,
            uses_data=self.uses_data,
        )

    def normal(self, name: str, size: float = 1.0) -> Tensor:
        """Standard normal of the samples' shape, or at a share of its height and width."""
        return self.draws.normal(name, shape_at(self.shape, size))

    def levels(self, level: Level) -> Levels:
        """One level for the whole batch."""
        return self.backbone.level_batch(level, len(self.draws))

    def student(self, level: Level) -> Role:
        """Who answers at a level."""
        return self.setting.route.student(level, self.expert)

    def student_x0(self, sample: Tensor, level: Level, following: Level) -> Tensor:
        """The student's prediction at one level, on its way to `following`."""
        now, end = self.levels(level), torch.tensor([following.timestep], device=sample.device)
        with target_time(end, now.timestep):  # heard by two-time students only
            return self.backbone.x0(self.student(level), sample, now, self.condition)

    def walk(self, grid: GridLaw, name: str) -> list[Tensor]:
        """Samples of the student's trajectory of a name as far as anybody needed them, from its
        noise on, without gradient; rollouts read and extend it."""
        return self._walks.setdefault((grid, name), [])

    def rolled(self, rollout: Rollout) -> Rolled:
        """The rollout's result, made once per update."""
        if rollout not in self._rolled:
            self._rolled[rollout] = rollout.run(self)
        return self._rolled[rollout]

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, made once per update and key: a discriminator's logits."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def question(self, rollout: Rollout, kernel: Kernel, tau: TauLaw, name: str = "") -> Question:
        """The probe at a rollout; terms with the same laws and name share it and its answers."""
        key = (rollout, kernel, tau, name)
        if key not in self._questions:
            rolled = self.rolled(rollout)
            schedule = self.backbone.schedule
            positions = tau.positions(
                self.draws.uniform(f"tau/{name}"),
                rolled.now,
                rolled.following,
                schedule,
                self.progress,
            )
            epsilon = self.draws.normal(f"epsilon/{name}", tuple(rolled.x0.shape[1:]))
            noised = kernel.noised(rolled, positions, epsilon, schedule)
            probe = Probe(
                self.backbone,
                noised.sample,
                noised.levels,
                noised.epsilon.detach(),
                self.condition,
                self.null_condition,
                noised.transition,
            )
            self._questions[key] = Question(probe, noised, rolled)
        return self._questions[key]


def detached(rolled: Rolled) -> Rolled:
    """The same without gradient."""
    return dataclasses.replace(
        rolled, sample=rolled.sample.detach(), x0=rolled.x0.detach(), end=rolled.end.detach()
    )


@torch.no_grad()
def first_noise(rolled: Rolled) -> Tensor:
    """The noise a trajectory began with.

    Raises:
        AssertionError: The rollout did not begin with noise.
    """
    assert rolled.start is not None
    return rolled.start
