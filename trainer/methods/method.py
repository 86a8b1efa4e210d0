"""What a method is: facts for people, settings for the command line, stages for the loop."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fewstep.noise_schedule import NoiseSchedule
from fewstep.recipe import FewStepRecipe
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.components.grids import FixedGrid, GridChoice, GridLaw, StudentPath
from fewstep.trainer.config_parts import GridConfig, LoraConfig
from fewstep.trainer.data.latent_book import LatentBook
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.parameters.policies import ParameterPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import Route, SingleRoute
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig


@dataclass(frozen=True, slots=True)
class MethodFacts:
    """What `--list` and docs/papers.md say of a method.

    Attributes:
        name: Its name on the command line.
        summary: One line.
        paper: Title and arXiv number.
        needs: "prompts", "prompts and pictures", "prompts and a reward".
        num_steps: Network evaluations per picture of its usual student.
        artefact: What a run makes.
        equation: The gradient or loss in one line of plain text.
        deviations: What differs from the paper, in words; empty where nothing does.
    """

    name: str
    summary: str
    paper: str
    needs: str
    num_steps: int
    artefact: str
    equation: str
    deviations: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a method builds its stages on.

    Attributes:
        config: The run's settings.
        backbone: The base.
        book: Prompts.
        paths: The student's grids, fewest steps first; `path` is the main one.
        path: The grid of `config.grid.num_steps`.
    """

    config: "TrainConfig"
    backbone: Backbone
    book: PromptBook
    paths: tuple[StudentPath, ...]
    path: StudentPath

    @property
    def schedule(self) -> NoiseSchedule:
        """Of the base."""
        return self.backbone.schedule

    @property
    def grid(self) -> GridLaw:
        """The grids a rollout draws from."""
        return FixedGrid(self.path) if len(self.paths) == 1 else GridChoice(self.paths)

    @property
    def guidance_scale(self) -> float:
        """The teacher's w."""
        return self.config.guidance_scale


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Interface: one named method. Its fields are settings with their paper's defaults."""

    facts: ClassVar[MethodFacts]

    @abstractmethod
    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        """The stages of a run."""

    def route(self, frame: Frame) -> Route:
        """Which student answers where; one for everything unless a method says otherwise."""
        return SingleRoute()

    def roles(self, frame: Frame) -> tuple[tuple[Role, ParameterPolicy], ...]:
        """Roles beyond student, critic and average, with their parameters."""
        return ()

    def modules(self, frame: Frame) -> dict[str, nn.Module]:
        """Trained parts that are no role's network, by name; seeded by the caller."""
        return {}

    def latents(self, frame: Frame) -> LatentBook | None:
        """Real data that the method brings along for a digits teacher; None takes the digits."""
        return None

    def grid(self, grid: GridConfig) -> GridConfig:
        """The grid this method's named recipe starts from: its paper's steps and re-noising."""
        return grid

    def parameters(self, lora: LoraConfig) -> LoraConfig:
        """The parameters its named recipe starts from."""
        return lora

    def recipe(self, recipe: FewStepRecipe, frame: Frame) -> FewStepRecipe:
        """The recipe of its product, from the one that lists the run's grids."""
        return recipe

    def check(self, config: "TrainConfig") -> None:
        """Refuse settings that cannot work with this method.

        Raises:
            ConfigError: They cannot; the message says why.
        """
        return
