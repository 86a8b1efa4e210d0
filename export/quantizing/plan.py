"""What is to be quantized, and what came of it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.export.quantizing.schemes import Scheme
from fewstep.export.quantizing.sensitivities import Sensitivities
from fewstep.export.quantizing.skipping import Skips

Weights = Mapping[str, np.ndarray]
"""Parameter name -> value as the torch module has it."""


@dataclass(frozen=True, slots=True)
class Distilled:
    """What quantisation-aware distillation made.

    Attributes:
        weights: Component -> trained values.
        steps: Of training.
        before: Error of the rounded network before training, root mean square, relative to the
            float network on the same inputs, along trajectories that were not trained on.
        after: The same, after.
    """

    weights: Mapping[str, Weights]
    steps: int
    before: float
    after: float

    def as_json(self) -> dict[str, float]:
        """For the record beside the graphs."""
        return {"steps": self.steps, "error_before": self.before, "error_after": self.after}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        scheme: How.
        components: Which graphs.
        skips: Which layers stay float.
        prompts: Where trajectories begin.
        threads: Of one network call; 0 takes ONNX Runtime's choice.
        distilled: Trained weights to take in place of the graph's own.
    """

    scheme: Scheme
    components: tuple[str, ...]
    skips: Skips
    prompts: tuple[str, ...]
    threads: int = 0
    distilled: Distilled | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One component that was quantized.

    Attributes:
        name: Of the component.
        opset: Of the graph that was written; some quantizers raise it.
        quantized: Layers in fewer bits.
        skipped: Layers that stayed float.
        bytes_before: Of model.onnx and model.onnx_data together.
        bytes_after: The same of the result.
        sensitivities: Where they were measured.
    """

    name: str
    opset: int
    quantized: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    sensitivities: Sensitivities | None = None

    @property
    def ratio(self) -> float:
        """Size after by size before."""
        return self.bytes_after / self.bytes_before

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        known = {**dataclasses.asdict(self), "ratio": self.ratio}
        known["sensitivities"] = self.sensitivities and self.sensitivities.as_json()
        return known
