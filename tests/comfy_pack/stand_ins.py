"""A MODEL's `model_sampling`, as far as our arithmetic asks it; written anew, in torch."""

import math
from typing import Any

import torch
from torch import Tensor

from fewstep.noise_schedule import Vp


class CONST:
    """Flow models have a class of this name among their bases."""


class EPS:
    """Epsilon models have this one."""


class V_PREDICTION(EPS):
    """v models have both."""


class EDM(V_PREDICTION):
    """These read a prediction in a third way."""


class FlowSampling(CONST):
    """Sigma is shifted; a timestep is a sigma, unshifted."""

    sigma_max = torch.tensor(1.0)

    def __init__(self, shift: float = 3.0) -> None:
        self.shift = shift
        self.sigma_min = self._shifted(torch.tensor(0.001))

    def percent_to_sigma(self, percent: float) -> float:
        return float(self._shifted(torch.tensor(1.0 - percent)))

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000.0 * sigma

    def _shifted(self, sigma: Tensor) -> Tensor:
        return self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)


class TableSampling(EPS):
    """A table of sigmas (noise over signal), float32."""

    def __init__(self, schedule: Vp | None = None) -> None:
        sigmas = torch.from_numpy((schedule or Vp()).sigmas())
        self.sigmas = (sigmas / (1.0 - sigmas**2).sqrt()).float()
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def sigma(self, timestep: Tensor) -> Tensor:
        place = timestep.clamp(0, len(self.sigmas) - 1)
        low, high = self.sigmas[math.floor(place)], self.sigmas[math.ceil(place)]
        return low.log().lerp(high.log(), place % 1.0).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return (self.sigmas.log() - sigma.log()).abs().argmin()


class VTableSampling(TableSampling, V_PREDICTION):
    """The same of a v model."""


class EdmSampling(TableSampling, EDM):
    """The same of an EDM model."""


class BaseModel:
    """The part of a MODEL that knows its patch size."""

    def __init__(self, **unet_config: Any) -> None:
        self.model_config = self
        self.unet_config = unet_config
