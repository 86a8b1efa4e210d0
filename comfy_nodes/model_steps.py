"""Planned steps in a MODEL's terms, and what a picture's size does to them. No ComfyUI here."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.comfy_nodes.model_levels import EXACT, ModelLevels
from fewstep.errors import ConfigError
from fewstep.recipe import FewStepRecipe
from fewstep.sampling import from_x0, to_x0
from fewstep.trajectory import PlannedStep

ZERO, ONE = np.zeros(()), np.ones(())


@dataclass(frozen=True, slots=True)
class ModelStep:
    """A planned step in a MODEL's terms.

    Attributes:
        planned: The step.
        scale: What the sample is multiplied with to be the MODEL's, at the sample's own level.
        sigma: What the MODEL calls the noise of that level.
        told_scale: The same where the network is called.
        told_sigma: The same; what the MODEL must be given for the network to be told its timestep.
        of_sample: x0 = of_sample * sample + of_x0 * x0 as the MODEL reads it where it is called.
        of_x0: See `of_sample`.
        clock: The timestep itself, where no sigma makes the MODEL tell it (between two timesteps
            of its table, or beyond them as PeRFlow's 1000).
    """

    planned: PlannedStep
    scale: float
    sigma: float
    told_scale: float
    told_sigma: float
    of_sample: float = 0.0
    of_x0: float = 1.0
    clock: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the network is called and read where the sample is, as nearly always."""
        is_there = self.told_sigma == self.sigma and self.clock is None
        return is_there and self.of_sample == 0.0 and self.of_x0 == 1.0


def model_steps(
    recipe: FewStepRecipe, plan: tuple[PlannedStep, ...], levels: ModelLevels
) -> tuple[ModelStep, ...]:
    """A recipe's planned steps in a MODEL's terms.

    Raises:
        AdapterError: The MODEL cannot tell its network a timestep the recipe asks for.
    """
    return tuple(_model_step(recipe, planned, levels) for planned in plan)


def image_tokens(base_model: Any, shape: tuple[int, ...]) -> int:
    """Tokens a transformer makes of latents, which size-dependent shifts go by.

    Args:
        base_model: The BaseModel inside a MODEL.
        shape: Of the latents, (B, C, h, w) or (B, C, frames, h, w).
    """
    patch = base_model.model_config.unet_config.get("patch_size", 2)
    side = patch if isinstance(patch, int) else patch[-1]
    height, width = (math.ceil(length / side) for length in shape[-2:])
    return math.prod(shape[2:-2]) * height * width


def mu_for(
    recipe: FewStepRecipe, base_model: Any, shape: tuple[int, ...] | None, num_steps: int | None
) -> float | None:
    """The shift of recipes whose sigmas depend on the picture's size; None for all others.

    Raises:
        ConfigError: It depends on a size that is not known.
    """
    rule = recipe.resolution_shift
    if rule is None:
        return None
    if shape is None:
        raise ConfigError(
            "This recipe's sigmas depend on the picture's size; connect the latent image that is "
            "sampled."
        )
    return rule.mu(image_tokens(base_model, shape), recipe.grid(num_steps).num_steps)


def _model_step(recipe: FewStepRecipe, planned: PlannedStep, levels: ModelLevels) -> ModelStep:
    wanted = planned.reading.timestep
    told = levels.told(wanted)
    is_told = math.isclose(told.timestep, wanted, rel_tol=EXACT)
    scale, sigma = levels.scale(told), levels.sigma(told)
    sigmas = (levels.sigma(planned.level), levels.sigma(planned.reading))
    if is_told and all(math.isclose(one, sigma, rel_tol=EXACT) for one in sigmas):
        return ModelStep(planned, scale, sigma, scale, sigma)
    prediction, reading = recipe.base.prediction, planned.reading
    of_sample, of_x0 = (
        to_x0(prediction, from_x0(prediction, x0, sample, told), sample, reading)
        for sample, x0 in ((ONE, ZERO), (ZERO, ONE))
    )
    return ModelStep(
        planned,
        scale=levels.scale(planned.level),
        sigma=sigmas[0],
        told_scale=scale,
        told_sigma=sigma,
        of_sample=float(of_sample),
        of_x0=float(of_x0),
        clock=None if is_told else wanted,
    )
