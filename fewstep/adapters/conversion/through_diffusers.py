"""Files whose names only diffusers' own converters know, taken through them and checked.

Most converters of diffusers multiply alpha into the weights, some know real widths only, and some
drop what they do not know with a line in the log. So the name tables of this package come first;
these converters serve what has no table: FLUX files of XLabs, and families such as FLUX.2. What
comes out is counted: an output row of an up matrix that went in must come out.
"""

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fewstep.adapters.conversion.name_rules import RULES
from fewstep.adapters.conversion.parts import split_name
from fewstep.adapters.conversion.tensor_reading import Read
from fewstep.adapters.header import AdapterHeader, TensorInfo
from fewstep.errors import AdapterError, MissingExtraError

if TYPE_CHECKING:
    import torch

LOADERS = {
    "flux": "FluxLoraLoaderMixin",
    "flux2": "Flux2LoraLoaderMixin",
    "lumina2": "Lumina2LoraLoaderMixin",
    "hidream": "HiDreamImageLoraLoaderMixin",
    "ltx2": "LTX2LoraLoaderMixin",
    "krea2": "Krea2LoraLoaderMixin",
    "anima": "AnimaLoraLoaderMixin",
    "ideogram4": "Ideogram4LoraLoaderMixin",
    "ace-step": "AceStepLoraLoaderMixin",
    "minimax-h3": "MiniMaxH3LoraLoaderMixin",
}
"""Family -> the diffusers class whose `lora_state_dict` knows its names."""


def needs_diffusers(header: AdapterHeader, family: str | None) -> bool:
    """Whether the names are of a kind that only diffusers' converters know."""
    if family not in LOADERS:
        return False
    if family in RULES:
        return any(".processor." in name and "_lora" in name for name in header.tensors)
    return True


def through_diffusers(header: AdapterHeader, family: str, read: Read) -> tuple[AdapterHeader, Read]:
    """The file after diffusers' converter: described like a file, and how to read it.

    Raises:
        AdapterError: The converter refused the file, or lost a part of it.
        MissingExtraError: diffusers is not installed.
    """
    try:
        from diffusers.loaders import lora_pipeline
    except ImportError as error:
        raise MissingExtraError("diffusers", "torch") from error
    if any(name.endswith(".dora_scale") for name in header.tensors):
        raise AdapterError(
            f"{header.path}: is DoRA of {family} with names that only diffusers reads, and it "
            "drops DoRA there; use a plain LoRA"
        )
    loader: Any = vars(lora_pipeline).get(LOADERS[family])
    if loader is None:
        raise AdapterError(
            f"{header.path}: this diffusers has no LoRA loader for {family}; update diffusers"
        )
    tensors = {name: read(name) for name in header.tensors}
    log = logging.getLogger("diffusers.loaders")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        converted = loader.lora_state_dict(dict(tensors))
    except Exception as error:  # whatever a converter trips over: KeyError, AssertionError, ...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise AdapterError(
            f"{header.path}: diffusers cannot convert this {family} adapter ({reason}); use one "
            "in diffusers names"
        ) from error
    finally:
        log.setLevel(level)
    found: dict[str, torch.Tensor] = converted[0] if isinstance(converted, tuple) else converted
    _check_complete(header, tensors, found)
    kinds = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    infos = {
        name: TensorInfo(kinds.get(str(values.dtype), "F32"), tuple(values.shape), 0, 0)
        for name, values in found.items()
    }
    return AdapterHeader(header.path, header.num_bytes, header.metadata, infos), found.__getitem__


def _check_complete(
    header: AdapterHeader, before: "dict[str, torch.Tensor]", after: "dict[str, torch.Tensor]"
) -> None:
    """Splitting a fused layer moves the rows of its up matrix and loses none."""
    had, has = (_up_rows(tensors.items()) for tensors in (before, after))
    if had != has:
        raise AdapterError(
            f"{header.path}: diffusers' converter kept {has} of {had} output rows, so layers would "
            "be lost; use an adapter in diffusers names"
        )


def _up_rows(tensors: "Iterable[tuple[str, torch.Tensor]]") -> int:
    rows = 0
    for name, values in tensors:
        is_up = split_name(name)[1] == "up" or name.endswith(".up.weight")
        rows += values.shape[0] if is_up and math.prod(values.shape) else 0
    return rows
