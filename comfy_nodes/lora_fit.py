"""An adapter's weights as patches of one MODEL, counted by what the MODEL really takes.

ComfyUI loads what it recognises and only logs the rest; here the rest is known by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora  # pyright: ignore[reportMissingImports]
import comfy.lora_convert  # pyright: ignore[reportMissingImports]
import comfy.utils  # pyright: ignore[reportMissingImports]
import comfy.weight_adapter  # pyright: ignore[reportMissingImports]

from fewstep.adapters.conversion.name_rules import UNETS
from fewstep.adapters.conversion.parts import split_name
from fewstep.comfy_nodes import lora_names
from fewstep.comfy_nodes.base_check import family_of
from fewstep.comfy_nodes.expert_patches import PatchGroups
from fewstep.comfy_nodes.lora_file import LoraFile, fingerprint
from fewstep.comfy_nodes.lora_names import NamedTensors
from fewstep.errors import AdapterError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """An adapter's weights as patches of one MODEL.

    Attributes:
        groups: For `add_patches`.
        matched: Layers of the file that the MODEL has.
        total: Layers of the file.
        unmatched: The first layer that it does not have; "" where all match.
        text_layers: Layers for text encoders.
    """

    groups: PatchGroups
    matched: int
    total: int
    unmatched: str
    text_layers: int


def fit_lora(model: Any, file: LoraFile, component: str) -> Fit:
    """A file's weights as patches of a MODEL, counted by what the MODEL really takes.

    Args:
        model: A MODEL; only looked at.
        file: The adapter.
        component: Pipeline component that is wanted, where the file has two.

    Raises:
        AdapterError: The file is damaged, or of a kind that ComfyUI has no names for.
    """
    path, stamp = file.header.path, fingerprint(file.header.path)
    shapes = {name: tuple(values.shape) for name, values in model.model.state_dict().items()}
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    family = family_of(model)
    base = _base_shapes(model, family, shapes)
    refusal: AdapterError | None = None
    fits = []
    if base and family:
        try:
            named = lora_names.converted(path, stamp, base, family=family, component=component)
        except AdapterError as error:
            named, refusal = None, error
        fits = [_fit(named, known, shapes)] if named else []
    if not fits or fits[0].unmatched:  # layers that only ComfyUI's own map knows
        try:
            fits.append(
                _fit(lora_names.as_it_is(path, stamp, known, component=component), known, shapes)
            )
        except AdapterError:
            if not fits:
                raise
    best = max(fits, key=lambda fit: (not fit.unmatched, fit.matched))
    if best.unmatched and refusal is not None:
        raise refusal
    return best


def _base_shapes(
    model: Any, family: str | None, shapes: Mapping[str, Shape]
) -> dict[str, Shape] | None:
    """The MODEL's parameters in diffusers' names, where they are known."""
    own = {
        name.removeprefix("diffusion_model."): shape
        for name, shape in shapes.items()
        if name.startswith("diffusion_model.")
    }
    if family in UNETS:
        names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        return {name: own[native] for name, native in names.items() if native in own}
    return lora_names.base_shapes(family, own)


def _fit(named: NamedTensors, known: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Fit:
    tensors = comfy.lora_convert.convert_lora(dict(named.tensors))
    whole = {name for name in tensors if split_name(name)[1] in ("diff", "diff_b")}
    groups, taken = [], set()
    # Apart, as in one call a delta would replace the LoRA of its layer.
    for part in (set(tensors) - whole, whole):
        group = {name: tensors[name] for name in tensors if name in part}
        loaded = comfy.lora.load_lora(group, dict(known), log_missing=False) if group else {}
        fitting = {
            target: patch for target, patch in loaded.items() if _fits(target, patch, shapes)
        }
        taken |= _names_taken(fitting, group)
        groups += [fitting] if fitting else []
    layers = dict.fromkeys(split_name(name)[0] for name in tensors)
    missing = dict.fromkeys(
        split_name(name)[0]
        for name in tensors
        if name not in taken and split_name(name)[1] != "alpha"
    )
    unmatched = [*named.left_out, *missing]
    total = len(layers) + len(named.left_out)
    return Fit(
        tuple(groups),
        total - len(unmatched),
        total,
        unmatched[0] if unmatched else "",
        named.text_layers,
    )


def _names_taken(loaded: Mapping[Any, Any], group: Mapping[str, Any]) -> set[str]:
    """Tensors that patches are made of; what they say of it themselves is one list for all."""
    names = {id(values): name for name, values in group.items()}
    taken = set()
    for patch in loaded.values():
        is_adapter = isinstance(patch, comfy.weight_adapter.WeightAdapterBase)
        for values in patch.weights if is_adapter else patch[1]:
            if id(values) in names:
                taken.add(names[id(values)])
    return taken


def _fits(target: Any, patch: Any, shapes: Mapping[str, Shape]) -> bool:
    """Whether a patch has its weight's size: ComfyUI itself would only log that it has not."""
    name, offset = (target, None) if isinstance(target, str) else (target[0], target[1])
    shape = shapes.get(name)
    if shape is None:
        return False
    if offset is not None:
        shape = tuple(offset[2] if i == offset[0] else size for i, size in enumerate(shape))
    if isinstance(patch, comfy.weight_adapter.LoRAAdapter):
        up, down, _, mid, _, reshape = patch.weights
        if mid is not None or reshape is not None:
            return True
        return up.shape[0] == shape[0] and down[0].numel() == math.prod(shape[1:])
    if isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
        return True
    return math.prod(patch[1][0].shape) == math.prod(shape)
