"""Which student answers: one, one per phase of noise, or one per group of prompts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.noise_schedule import Level
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.draws import Draws
from fewstep.trainer.roles import Role


class Route(ABC):
    """Interface: the students of a run and where each answers."""

    @abstractmethod
    def experts(self) -> tuple[int | None, ...]:
        """Their numbers; (None,) for a single student."""

    @abstractmethod
    def student(self, level: Level, expert: int | None) -> Role:
        """Who answers at a level while `expert` is being trained."""

    @abstractmethod
    def draw_prompts(self, book: PromptBook, draws: Draws, expert: int | None) -> Tensor:
        """Prompt indices for an update of `expert`, shape (B,)."""

    def roles(self, role: Role) -> tuple[Role, ...]:
        """The role of every student: `student`, or `student-0`, `student-1`, ..."""
        return tuple(role if k is None else role.expert(k) for k in self.experts())


@dataclass(frozen=True, slots=True)
class SingleRoute(Route):
    """One student for everything."""

    def experts(self) -> tuple[int | None, ...]:
        return (None,)

    def student(self, level: Level, expert: int | None) -> Role:
        return Role.STUDENT

    def draw_prompts(self, book: PromptBook, draws: Draws, expert: int | None) -> Tensor:
        return draws.integers("prompt", len(book.prompts))


@dataclass(frozen=True, slots=True)
class PhaseRoute(Route):
    """One student per interval of noise: expert k serves bounds[k] >= sigma > bounds[k + 1].

    Attributes:
        bounds: Sigmas, falling from the first level to 0.
    """

    bounds: tuple[float, ...]

    def experts(self) -> tuple[int | None, ...]:
        return tuple(range(len(self.bounds) - 1))

    def expert_at(self, sigma: float) -> int:
        """The expert whose interval holds sigma; a boundary is the cleaner one's first level."""
        for k in range(len(self.bounds) - 2):
            if sigma > self.bounds[k + 1] + 1e-6:
                return k
        return len(self.bounds) - 2

    def student(self, level: Level, expert: int | None) -> Role:
        return Role.STUDENT.expert(self.expert_at(level.sigma))

    def draw_prompts(self, book: PromptBook, draws: Draws, expert: int | None) -> Tensor:
        return draws.integers("prompt", len(book.prompts))


@dataclass(frozen=True, slots=True)
class ConditionRoute(Route):
    """One student per group of prompts (MSD).

    Attributes:
        groups: Prompt indices of each student.
    """

    groups: tuple[tuple[int, ...], ...]

    def experts(self) -> tuple[int | None, ...]:
        return tuple(range(len(self.groups)))

    def student(self, level: Level, expert: int | None) -> Role:
        assert expert is not None
        return Role.STUDENT.expert(expert)

    def draw_prompts(self, book: PromptBook, draws: Draws, expert: int | None) -> Tensor:
        assert expert is not None
        group = torch.tensor(self.groups[expert])
        return group[draws.integers("prompt", len(group))]
