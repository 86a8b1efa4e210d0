"""What conversion gives: an adapter in diffusers' names, nothing applied, nothing lost."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.adapters.coverage import Coverage
from fewstep.adapters.header import AdapterHeader

if TYPE_CHECKING:
    import torch

DOWN, UP, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class ConvertedAdapter:
    """An adapter file in diffusers' names.

    Attributes:
        header: The file.
        component: Pipeline component the denoiser's modules go on: "unet", "transformer", ...
        tensors: Of the denoiser, names without component: `<module>.lora_A.weight` (rank, in, ...),
            `<module>.lora_B.weight` (out, rank, ...), of DoRA `<module>.lora_magnitude_vector`
            (out,). Alpha is not yet applied.
        alphas: Module -> alpha; the rank where the file says nothing.
        ranks: Module -> rank.
        text_tensors: Text encoder component -> the same naming.
        text_alphas: Text encoder component -> module -> alpha.
        extras: Whole deltas, alpha applied, by parameter of the base: `<module>.weight`, `.bias`.
        coverage: Proof that everything fits the base.
        family: Base family that the names were read as.
    """

    header: AdapterHeader
    component: str
    tensors: "dict[str, torch.Tensor]"
    alphas: dict[str, float]
    ranks: dict[str, int]
    text_tensors: "dict[str, dict[str, torch.Tensor]]"
    text_alphas: dict[str, dict[str, float]]
    extras: "dict[str, torch.Tensor]"
    coverage: Coverage
    family: str | None = None
