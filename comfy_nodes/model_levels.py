"""Noise levels as a recipe states them and as a MODEL of ComfyUI has them, and the way between.

A recipe's sample is `alpha * x0 + sigma * noise`. Flow models are that in ComfyUI too; models of
the Stable Diffusion family are variance exploding there, `x0 + sigma / alpha * noise`, which is a
recipe's sample divided by alpha. Imports torch and not ComfyUI: what a MODEL is, is told by the
class names of its `model_sampling`, so that this is tested without it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import AdapterError, ConfigError
from fewstep.noise_schedule import CLEAN, Flow, Level, NoiseSchedule
from fewstep.recipe import FewStepRecipe

SAME_SIGMA = 1e-4
"""Relative distance up to which two sigmas are one (tables and wires are float32)."""
EXACT = 1e-6
"""Relative distance up to which nothing needs converting: the rounding of float32."""


class ModelLevels(ABC):
    """Interface: how one kind of MODEL writes noise levels."""

    @abstractmethod
    def sigma(self, level: Level) -> float:
        """What the MODEL calls the noise of a level."""

    @abstractmethod
    def scale(self, level: Level) -> float:
        """What a recipe's sample is multiplied with to be the MODEL's."""

    @abstractmethod
    def level(self, sigma: float) -> Level:
        """The level of a sigma of the MODEL's."""

    @abstractmethod
    def sigma_at(self, timestep: float) -> float:
        """The MODEL's sigma at a timestep."""

    @abstractmethod
    def told(self, timestep: float) -> Level:
        """The level at which the MODEL tells its network this timestep, or the nearest to it.

        Where it is only near, the level's own timestep is what the MODEL would tell.

        Raises:
            AdapterError: The MODEL has this timestep and tells another one all the same.
        """

    @property
    @abstractmethod
    def schedule(self) -> NoiseSchedule:
        """The MODEL's own schedule, for samplers without a recipe."""


@dataclass(frozen=True, slots=True)
class FlowLevels(ModelLevels):
    """Rectified flow: the same numbers on both sides.

    Attributes:
        count: Timesteps at sigma 1, as the recipe counts them.
    """

    count: int = 1000

    def sigma(self, level: Level) -> float:
        return level.sigma

    def scale(self, level: Level) -> float:
        return 1.0

    def level(self, sigma: float) -> Level:
        return self.schedule.level(sigma * self.count, sigma) if sigma else CLEAN

    def sigma_at(self, timestep: float) -> float:
        return timestep / self.count

    def told(self, timestep: float) -> Level:
        return self.schedule.level(timestep)

    @property
    def schedule(self) -> NoiseSchedule:
        return Flow(num_train_timesteps=self.count)


@dataclass(frozen=True, slots=True)
class ExplodingLevels(ModelLevels):
    """Variance exploding, over a table of sigmas.

    Attributes:
        model_sampling: The MODEL's.
    """

    model_sampling: Any

    def sigma(self, level: Level) -> float:
        own = level.sigma / level.alpha
        if level.timestep != round(level.timestep):
            return own
        # The table's own number: core looks a sigma up in it, and compares with its largest.
        of_table = self.sigma_at(level.timestep)
        return of_table if math.isclose(of_table, own, rel_tol=SAME_SIGMA) else own

    def scale(self, level: Level) -> float:
        return 1.0 / level.alpha

    def level(self, sigma: float) -> Level:
        if sigma == 0.0:
            return CLEAN
        alpha = 1.0 / math.sqrt(1.0 + sigma * sigma)
        return Level(_timestep_at(self.model_sampling, sigma), alpha, alpha * sigma)

    def sigma_at(self, timestep: float) -> float:
        return _sigma_at(self.model_sampling, timestep)

    def told(self, timestep: float) -> Level:
        level = self.level(self.sigma_at(timestep))
        is_in_table = timestep == round(timestep) and timestep < len(self.model_sampling.sigmas)
        if is_in_table and level.timestep != timestep:
            raise AdapterError(
                f"This recipe tells the network timestep {timestep:g}, which MODEL turns into "
                f"{level.timestep:g}; remove ModelSampling nodes before the sampler."
            )
        return level

    @property
    def schedule(self) -> NoiseSchedule:
        return TableSchedule(self)


@dataclass(frozen=True, slots=True)
class TableSchedule(NoiseSchedule):
    """The variance preserving schedule that a MODEL's table stands for.

    Attributes:
        levels: The table.
    """

    levels: ExplodingLevels

    def alpha_of_sigma(self, sigma: float) -> float:
        return math.sqrt(1.0 - sigma * sigma)

    def sigma_of_timestep(self, timestep: float) -> float:
        return self.levels.level(self.levels.sigma_at(timestep)).sigma

    def timestep_of_sigma(self, sigma: float) -> float:
        exploding = sigma / self.alpha_of_sigma(sigma)
        return self.levels.level(exploding).timestep if sigma else 0.0

    def via(self, following: Level, stochasticity: float) -> Level:
        """TCD's rule, as `noise_schedule.Vp.via`."""
        if following.timestep < 1.0 or stochasticity == 0.0:
            return following
        if stochasticity == 1.0:
            return CLEAN
        return self.level(math.floor((1.0 - stochasticity) * following.timestep + EXACT))

    def uniform_timesteps(self, num_steps: int) -> tuple[float, ...]:
        """ "trailing" spacing."""
        count = len(self.levels.model_sampling.sigmas)
        return tuple(float(round(count - i * count / num_steps) - 1) for i in range(num_steps))


def levels_of_model(model_sampling: Any) -> ModelLevels:
    """How a MODEL writes noise levels.

    Raises:
        AdapterError: It is of a kind no few-step recipe is made for.
    """
    names = {one.__name__ for one in type(model_sampling).__mro__}
    if "CONST" in names:
        return FlowLevels()
    if "EPS" in names and not names & {"EDM", "IMG_TO_IMG"}:
        return ExplodingLevels(model_sampling)
    raise AdapterError(
        "MODEL is neither a flow model nor of the Stable Diffusion family, and few-step recipes "
        "are made for those; load another base."
    )


def levels_for(recipe: FewStepRecipe, model_sampling: Any) -> ModelLevels:
    """The same, checked against the base a recipe was made for.

    Raises:
        AdapterError: MODEL is another base.
    """
    levels = levels_of_model(model_sampling)
    is_flow = isinstance(levels, FlowLevels)
    if is_flow != (recipe.base.schedule.kind == "flow"):
        kinds = ("a flow model", "an epsilon or v model")
        ours, theirs = kinds if is_flow else kinds[::-1]
        raise AdapterError(
            f"This recipe was made for {theirs} ({recipe.base.family}), but MODEL is {ours}; load "
            f"a {recipe.base.family} checkpoint."
        )
    if is_flow:
        return FlowLevels(recipe.base.schedule.num_train_timesteps)
    _check_table(recipe, model_sampling)
    return levels


def comfy_sigmas(
    recipe: FewStepRecipe,
    model_sampling: Any,
    num_steps: int | None = None,
    mu: float | None = None,
) -> Tensor:
    """A recipe's sigmas as SIGMAS of this MODEL: 1-D, float32, falling, N + 1 values.

    Raises:
        AdapterError: MODEL is another base.
        RecipeError: The recipe does not know this step count.
    """
    levels = levels_for(recipe, model_sampling)
    return torch.tensor([levels.sigma(one) for one in recipe.levels(num_steps, mu=mu)])


def levels_of_sigmas(sigmas: Tensor, model_sampling: Any) -> tuple[Level, ...]:
    """The levels that any SIGMAS of a MODEL stand for.

    Raises:
        ConfigError: They do not fall, or hold a value the MODEL does not know.
    """
    levels = levels_of_model(model_sampling)
    values = [float(sigma) for sigma in sigmas]
    for entry, (now, following) in enumerate(zip(values, values[1:], strict=False), start=2):
        if not now > following >= 0.0:
            raise ConfigError(
                f"Sigmas must fall: {now:g} is followed by {following:g} (entry {entry})."
            )
    return tuple(levels.level(value) for value in values)


def _check_table(recipe: FewStepRecipe, model_sampling: Any) -> None:
    schedule = recipe.base.schedule.build()
    for level in recipe.levels():
        if level.sigma == 0.0:
            continue
        timestep = round(level.timestep)
        wanted = schedule.level(timestep)
        found = _sigma_at(model_sampling, timestep)
        if not math.isclose(found, wanted.sigma / wanted.alpha, rel_tol=SAME_SIGMA):
            raise AdapterError(
                f"This recipe's base has sigma {wanted.sigma / wanted.alpha:.4g} at timestep "
                f"{timestep}, but MODEL has {found:.4g}, so it is another base; load a "
                f"{recipe.base.family} checkpoint, and remove ModelSampling nodes before the "
                "sampler."
            )


def _sigma_at(model_sampling: Any, timestep: float) -> float:
    return float(model_sampling.sigma(torch.tensor(float(timestep))))


def _timestep_at(model_sampling: Any, sigma: float) -> float:
    return float(model_sampling.timestep(torch.tensor(sigma)))
