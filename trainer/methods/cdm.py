"""CDM: distribution matching on random grids and beside them; the student takes any step count."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow
from fewstep.recipe import FewStepRecipe
from fewstep.trainer.components.grids import RandomGrid
from fewstep.trainer.components.rollouts import OffPath, StudentRollout
from fewstep.trainer.components.taus import Below
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import at_least, within
from fewstep.trainer.config_parts import GridConfig
from fewstep.trainer.methods.decoupled_dmd import augmentation, unguided_matching
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import EXITS, MatchConfig, aligned
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class RandomGridConfig:
    """A new grid for every update."""

    least: int = 1
    """Fewest steps."""
    most: int = 8
    """Most steps (released configuration: 28)."""
    low: float = 0.25
    """Lowest position of an inner step, share of the schedule."""
    high: float = 0.95
    """Highest."""

    def __post_init__(self) -> None:
        at_least("least", self.least, 1)
        at_least("most", self.most, self.least)
        within("low", self.low, 0.0, self.high)
        within("high", self.high, self.low, 1.0)


@dataclass(frozen=True, kw_only=True)
class Cdm(Method):
    """Liu et al. 2026: continuous-time distribution matching."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="cdm",
        summary="matching on random grids and beside them: one adapter for any number of steps",
        paper="CDM, arXiv:2605.06376",
        needs="prompts",
        num_steps=4,
        artefact="LoRA",
        equation="decoupled-dmd on a random deterministic grid, and its matching half also at "
        "x' = x_t + (sigma' - sigma_t) v_student",
        deviations="guidance half weighs w - 1, not w; the critic is pulled to the student once "
        "per student step; up to 8 steps instead of 28; critic is an adapter unless lora.critic "
        "is full",
    )
    match: MatchConfig = field(default_factory=lambda: MatchConfig(ida=0.999))
    random: RandomGridConfig = field(default_factory=RandomGridConfig)
    off_path_weight: float = 1.0
    """Of the matching beside the trajectory."""

    def __post_init__(self) -> None:
        at_least("off-path-weight", self.off_path_weight, 0.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, random = self.match, self.random
        grid = RandomGrid(frame.schedule, random.least, random.most, random.low, random.high)
        # one trajectory, three steps of it
        guided, matched, left = (
            StudentRollout(grid, EXITS[match.exit], pick=name)
            for name in ("guided", "matched", "left")
        )
        beside = OffPath(left, match.tau_min, match.tau_max)
        return (
            Stage(
                name="continuous-time matching",
                num_steps=match.num_steps,
                terms=(
                    *augmentation(frame, match, guided, Below()),
                    Weighted(unguided_matching(match, matched)),
                    Weighted(unguided_matching(match, beside, "off-path"), self.off_path_weight),
                ),
                learning_rate=match.learning_rate,
                betas=match.betas,
                critic=match.critic(matched),
                actions=aligned(match),
            ),
        )

    def grid(self, grid: GridConfig) -> GridConfig:
        others = tuple(count for count in COUNTS if count != grid.num_steps)
        return dataclasses.replace(grid, also_steps=others)

    def recipe(self, recipe: FewStepRecipe, frame: Frame) -> FewStepRecipe:
        schedule = recipe.base.schedule
        if isinstance(frame.schedule, Flow):
            # grids made on demand are shifted as the listed ones were
            schedule = dataclasses.replace(schedule, shift=frame.config.grid.shift)
        base = dataclasses.replace(recipe.base, schedule=schedule)
        return dataclasses.replace(recipe, base=base, steps="any")

    def check(self, config: "TrainConfig") -> None:
        if config.grid.stochasticity > 0.0:
            raise ConfigError(
                f"cdm rolls out and samples by the ODE, but grid.stochasticity is "
                f"{config.grid.stochasticity:g}; set it to 0"
            )
        if self.match.exit == "not-first" and self.random.least < 2:
            raise ConfigError(
                "match.exit is not-first, but random.least is 1: grids of 1 step have no other; "
                "raise random.least to 2"
            )
