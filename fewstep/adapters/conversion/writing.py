"""A converted adapter in the names of one kind of program.

flavour     UNet                    transformers                             alpha
diffusers   unet.<module>           transformer.<module>                     LoraConfig
comfyui     lora_unet_<flattened>   names of its key map: see `COMFYUI`      tensors
kohya       lora_unet_<flattened>   lora_unet_<native module, flattened>     tensors
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fewstep.adapters.conversion.converted import DOWN, MAGNITUDE, UP, ConvertedAdapter
from fewstep.adapters.conversion.diffusers_flavour import diffusers_flavour
from fewstep.adapters.conversion.fused import FUSED_KEY, Factors, merge, swapped
from fewstep.adapters.conversion.name_index import weights_of
from fewstep.adapters.conversion.name_rules import (
    RULES,
    UNETS,
    NativeModule,
    native_modules,
    pattern_of,
)
from fewstep.adapters.conversion.text_names import kohya_text_name
from fewstep.adapters.modules import ALPHA_KEYS, LORA_METADATA_KEY
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch

Format = Literal["diffusers", "comfyui", "kohya"]
Shape = tuple[int, ...]
COMFYUI: dict[str, str] = {
    **dict.fromkeys(UNETS, "lora_unet_"),
    **dict.fromkeys(("sd3", "flux", "pixart"), "transformer."),
    **dict.fromkeys(("qwen-image", "z-image"), "diffusion_model."),
    **dict.fromkeys(("wan", "ltx", "hunyuan-video"), "diffusion_model.native."),
}
"""Family -> how its LoRA names begin. Where ComfyUI's key map has diffusers' module names, it also
knows which rows of a fused layer they are; "native." stands for the model's own names."""
STALE = (
    LORA_METADATA_KEY,
    FUSED_KEY,
    *ALPHA_KEYS,
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.implementation"),
)
"""Metadata that is about the tensors as they were."""


@dataclass(frozen=True, slots=True)
class Flavoured:
    """A file to be written.

    Attributes:
        tensors: Name -> values.
        metadata: Text to text.
    """

    tensors: "dict[str, torch.Tensor]" = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def in_format(
    adapter: ConvertedAdapter, base_shapes: Mapping[str, Shape], flavour: Format
) -> Flavoured:
    """The adapter in a program's names; values unchanged, metadata kept.

    Args:
        adapter: What `convert_to_diffusers` gave.
        base_shapes: diffusers parameter name -> shape of the denoiser.
        flavour: Whose names.

    Raises:
        AdapterError: The program has no names for this family or this layer, or cannot apply it.
    """
    kept = {key: text for key, text in adapter.header.metadata.items() if key not in STALE}
    file = Flavoured(metadata={**kept, "format": "pt"})
    if flavour == "diffusers":
        tensors, config = diffusers_flavour(adapter, base_shapes)
        file.tensors.update(tensors)
        file.metadata[LORA_METADATA_KEY] = json.dumps(config, sort_keys=True)
    else:
        _Tensors(adapter, base_shapes, flavour, file).write()
    return file


class _Tensors:
    """Writes flavours that keep alpha in tensors."""

    def __init__(
        self,
        adapter: ConvertedAdapter,
        base_shapes: Mapping[str, Shape],
        flavour: Format,
        file: Flavoured,
    ) -> None:
        self._adapter, self._file, self._family = adapter, file, adapter.family
        self._weights = weights_of(base_shapes)
        self._is_unet = adapter.family in UNETS
        prefix = self._prefix(flavour)
        self._is_native = prefix.endswith("native.")
        prefix = prefix.removesuffix("native.")
        self._prefix_text = prefix
        self._native = self._native_by_part()
        self._ranks: dict[str, list[int]] = {}

    def _prefix(self, flavour: Format) -> str:
        if flavour == "kohya":
            return "lora_unet_" if self._is_unet else "lora_unet_native."
        if self._family not in COMFYUI:
            raise AdapterError(
                f"{self._adapter.header.path}: ComfyUI 0.8.0 has no {self._family or 'such'} "
                "model, so there are no names to write; use the diffusers format"
            )
        return COMFYUI[self._family]

    def _native_by_part(self) -> dict[str, NativeModule]:
        found: dict[str, NativeModule] = {}
        if self._family not in RULES:
            raise AdapterError(
                f"{self._adapter.header.path}: the layers of a {self._family or 'foreign'} model "
                "have no kohya names here; use the diffusers format"
            )
        for native in native_modules(self._family, self._weights):
            for part in native.parts:
                found.setdefault(part, native)
        return found

    def write(self) -> None:
        """Fill the file."""
        for module in self._adapter.ranks:
            if self._is_native:
                native = self._native_of(module)
                if module == next(part for part in native.parts if part in self._adapter.ranks):
                    self._put(self._named(native.name), self._fused(native))
            else:
                self._put(self._named(module), self._factors(module))
        for component, tensors in self._adapter.text_tensors.items():
            for module, alpha in self._adapter.text_alphas[component].items():
                name = kohya_text_name(component, module, self._family)
                self._put(name, _factors(tensors, module, alpha))
        self._write_extras()
        if self._ranks:
            self._file.metadata[FUSED_KEY] = json.dumps(self._ranks, sort_keys=True)

    def _named(self, module: str) -> str:
        if self._prefix_text == "lora_unet_":
            module = module.replace(".", "_")
        return self._prefix_text + module

    def _native_of(self, module: str) -> NativeModule:
        if module in self._native:
            return self._native[module]
        where = f"{self._adapter.header.path}: {module}"
        parts = (part for rule in RULES[self._family or ""] for part in rule.parts)
        if any(pattern_of(part).fullmatch(module) for part in parts):
            raise AdapterError(
                f"{where} is one part of a fused layer in the {self._family} model's own code, and "
                "how large the other parts are is not in the file; give --base, the folder of the "
                "model it is for"
            )
        raise AdapterError(
            f"{where} has no name in the {self._family} model's own code, so this format cannot "
            "hold it; use the diffusers format"
        )

    def _factors(self, module: str) -> Factors:
        return _factors(self._adapter.tensors, module, self._adapter.alphas[module])

    def _fused(self, native: NativeModule) -> Factors:
        parts = [self._factors(p) if p in self._adapter.ranks else None for p in native.parts]
        if len(parts) > 1:
            factors, ranks = merge(parts, native.rows)
            self._ranks[native.name] = list(ranks)
            return factors
        (factors,) = parts
        assert factors is not None
        return factors.swapped() if native.swaps else factors

    def _put(self, name: str, factors: Factors) -> None:
        tensors = self._file.tensors
        tensors[f"{name}.lora_down.weight"] = factors.down
        tensors[f"{name}.lora_up.weight"] = factors.up
        tensors[f"{name}.alpha"] = _scalar(factors.alpha)
        if factors.magnitude is not None:
            ones = (1,) * (factors.up.ndim - 1)
            tensors[f"{name}.dora_scale"] = factors.magnitude.reshape(-1, *ones)

    def _write_extras(self) -> None:
        """Whole deltas under native names, which take them in every ComfyUI family."""
        done = set()
        for parameter in self._adapter.extras:
            module, _, kind = parameter.rpartition(".")
            ending = {"weight": ".diff", "bias": ".diff_b"}[kind]
            if self._is_unet:
                self._file.tensors[self._named(module) + ending] = self._adapter.extras[parameter]
                continue
            native = self._native_of(module)
            if (native.name, kind) not in done:
                done.add((native.name, kind))
                rows = self._fused_delta(native, kind)
                self._file.tensors[self._native_name(native) + ending] = rows

    def _native_name(self, native: NativeModule) -> str:
        return self._named(native.name) if self._is_native else f"diffusion_model.{native.name}"

    def _fused_delta(self, native: NativeModule, kind: str) -> "torch.Tensor":
        import torch

        found = [self._adapter.extras.get(f"{part}.{kind}") for part in native.parts]
        there = next(delta for delta in found if delta is not None)
        rows = torch.cat(
            [
                there.new_zeros(height, *there.shape[1:]) if delta is None else delta
                for delta, height in zip(found, native.rows, strict=True)
            ]
        )
        return swapped(rows) if native.swaps else rows


def _factors(tensors: "Mapping[str, torch.Tensor]", module: str, alpha: float) -> Factors:
    return Factors(
        tensors[module + DOWN], tensors[module + UP], alpha, tensors.get(module + MAGNITUDE)
    )


def _scalar(value: float) -> "torch.Tensor":
    """Alpha as a tensor: float32 like everyone's, float64 where that would round."""
    import torch

    single = torch.tensor(value, dtype=torch.float32)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)
