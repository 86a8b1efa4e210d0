"""A policy head goes along when its LoRA is converted: under our names, its values as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.tensor_reading import open_tensors
from fewstep.adapters.conversion.writing import Flavoured, Format
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.kinds import KIND_TEXTS, NEEDS_KEY, adapter_parts, needs_text
from fewstep.adapters.policy_names import CONFIG_KEY, POLICY, is_polynomial
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class KeptHead:
    """What a file holds beside its LoRA.

    Attributes:
        tensors: Our name -> values; {} of a file without a policy head.
    """

    tensors: "Mapping[str, torch.Tensor]"

    def put_back(self, file: Flavoured) -> None:
        """Add it to a converted LoRA."""
        if self.tensors:
            file.tensors.update(self.tensors)
            file.metadata[NEEDS_KEY] = needs_text("policy")
            file.metadata.pop(CONFIG_KEY, None)  # the names say it now


def take_head(header: AdapterHeader, flavour: Format) -> tuple[AdapterHeader, KeptHead]:
    """A file as its LoRA alone, and its policy head.

    Args:
        header: Any adapter file.
        flavour: Whose names the LoRA will have.

    Raises:
        AdapterError: There is a head, and the names are those of a program that has none.
    """
    names = adapter_parts(header).policy
    if not names:
        return header, KeptHead({})
    if flavour != "diffusers":
        raise AdapterError(
            f"{header.path}: is a {KIND_TEXTS['policy']}, which no program of the {flavour} format "
            "can apply; give --format diffusers, which FewStepPipeline samples"
        )
    if is_polynomial(header.metadata):
        raise AdapterError(
            f"{header.path}: its metadata says that its policy is a polynomial in time, which no "
            "recipe has; use the pipeline of its authors"
        )
    read = open_tensors(header)
    kept = {f"{POLICY}{plain}": read(name) for plain, name in names.items()}
    of_head = set(names.values())
    lora = {name: info for name, info in header.tensors.items() if name not in of_head}
    return replace(header, tensors=lora), KeptHead(kept)
