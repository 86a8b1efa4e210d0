"""The names that diffusers' own loaders read, alpha in a LoraConfig."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.converted import DOWN, MAGNITUDE, UP, ConvertedAdapter
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch


def diffusers_flavour(
    adapter: ConvertedAdapter, base_shapes: Mapping[str, tuple[int, ...]]
) -> "tuple[dict[str, torch.Tensor], dict[str, object]]":
    """Tensors and the LoraConfig that says their alpha.

    Raises:
        AdapterError: It has whole deltas, which diffusers cannot load.
    """
    weights = [name for name in adapter.extras if not name.endswith(".bias")]
    if weights:
        raise AdapterError(
            f"{adapter.header.path}: changes {weights[0]} by a whole delta, which diffusers cannot "
            "load as an adapter; give a rank, to make it LoRA"
        )
    file: dict[str, torch.Tensor] = {}
    config: dict[str, object] = {}
    parts = {adapter.component: adapter.tensors, **adapter.text_tensors}
    alphas = {adapter.component: adapter.alphas, **adapter.text_alphas}
    for component, tensors in parts.items():
        if tensors:
            file.update({f"{component}.{name}": v for name, v in tensors.items()})
            config |= _lora_config(component, tensors, alphas[component])
    if adapter.extras:
        config[f"{adapter.component}.lora_bias"] = True
        file.update(_lora_biases(adapter, base_shapes))
    return file, config


def _lora_config(
    component: str, tensors: "Mapping[str, torch.Tensor]", alphas: Mapping[str, float]
) -> dict[str, object]:
    """The least that diffusers and peft need; most modules have the usual rank and alpha."""
    ranks = {module: tensors[module + DOWN].shape[0] for module in alphas}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config: dict[str, object] = {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(ranks),
    }
    # "^" binds a pattern to the whole name; without it "proj_out" also means "blocks.0.proj_out".
    other_ranks = {f"^{module}": r for module, r in ranks.items() if r != rank}
    other_alphas = {f"^{module}": a for module, a in alphas.items() if a != alpha}
    if other_ranks:
        config["rank_pattern"] = other_ranks
    if other_alphas:
        config["alpha_pattern"] = other_alphas
    if any(name.endswith(MAGNITUDE) for name in tensors):
        config["use_dora"] = True
    return {f"{component}.{key}": value for key, value in config.items()}


def layer_without_bias(
    modules: Iterable[str], base_shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first adapted layer that has no bias in the base, or None."""
    return next((module for module in modules if f"{module}.bias" not in base_shapes), None)


def _lora_biases(
    adapter: ConvertedAdapter, base_shapes: Mapping[str, tuple[int, ...]]
) -> "dict[str, torch.Tensor]":
    """Bias deltas as peft's `lora_B.bias`, which it multiplies with alpha / rank like the rest.

    peft has them on every adapted layer or on none, and warns and cannot merge where a layer has
    no bias of its own.
    """
    biases = {}
    stray = [n for n in adapter.extras if n.removesuffix(".bias") not in adapter.ranks]
    bare = layer_without_bias(adapter.ranks, base_shapes)
    if stray or bare:
        reason = f"{stray[0]} has no LoRA beside it" if stray else f"{bare} has no bias"
        raise AdapterError(
            f"{adapter.header.path}: has bias deltas, which diffusers holds on every adapted layer "
            f"or on none, and {reason}; use the comfyui format"
        )
    for module, rank in adapter.ranks.items():
        up = adapter.tensors[module + UP]
        delta = adapter.extras.get(f"{module}.bias", up.new_zeros(up.shape[0]))
        if adapter.alphas[module] != rank:
            delta = delta * (rank / adapter.alphas[module])
        biases[f"{adapter.component}.{module}.lora_B.bias"] = delta
    return biases
