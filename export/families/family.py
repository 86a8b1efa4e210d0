"""What is said of a family of pipelines so that it can be exported."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from fewstep.errors import ExportError
from fewstep.export.part import Part

MASKED = (
    "rewrites prompts and masks their padding before its text encoder, which no fused graph of "
    "token ids does"
)
"""Of families whose text encoder is given a mask."""


class ExportFamily(ABC):
    """One family.

    Attributes:
        name: As in recipes and manifests.
        pipelines: Classes of stock pipelines that are exported so.
        denoiser: Name of the part that is called once per step.
        not_fused: Why no single graph can hold all of it, after the family's name; empty where one
            can.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str] = "transformer"
    not_fused: ClassVar[str] = ""

    @property
    def can_be_fused(self) -> bool:
        """Whether one graph can hold all of it."""
        return not self.not_fused

    @abstractmethod
    def parts(self, pipe: Any) -> tuple[Part, ...]:
        """Every component as it is exported, the denoiser among them."""

    @abstractmethod
    def settings(self, pipe: Any) -> dict[str, float]:
        """Numbers its host needs beyond the graphs."""

    def texts(self, pipe: Any) -> dict[str, str]:
        """Texts its host puts around prompts; none, unless the network has a template."""
        del pipe
        return {}


def part_of(pipe: Any, name: str) -> Any:
    """A component that the export cannot do without.

    Raises:
        ExportError: The pipeline was loaded without it.
    """
    found = getattr(pipe, name, None)
    if found is None:
        raise ExportError(
            f"this {type(pipe).__name__} has no {name}, which its export needs; load it whole"
        )
    return found


def autoencoder_settings(model: Any, factor: int) -> dict[str, float]:
    """Scale and shift around an autoencoder, and its pixels per latent."""
    config = model.config
    return {
        "vae_scale_factor": factor,
        "latent_channels": config.latent_channels,
        "scaling_factor": float(getattr(config, "scaling_factor", None) or 1.0),
        "shift_factor": float(getattr(config, "shift_factor", None) or 0.0),
    }


def square(sample_size: int | tuple[int, int]) -> int:
    """Side of the latents a network was trained at."""
    return sample_size if isinstance(sample_size, int) else min(sample_size)


def stock_default(pipe: Any, name: str) -> Any:
    """What a stock pipeline takes where a call does not name an argument."""
    return inspect.signature(type(pipe).__call__).parameters[name].default
