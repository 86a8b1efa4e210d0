"""The LoRA modules of a file: pairs of down and up with their rank and alpha."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.adapters.header import AdapterHeader, TensorInfo
from fewstep.adapters.names import DENOISER, Part, TensorName, parse_name, shown
from fewstep.errors import AdapterError

LORA_METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the LoraConfig, as JSON with component prefixes."""

ALPHA_KEYS = ("lora_alpha", "network_alpha", "alpha")
"""Metadata entries that give one alpha for the whole file."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted layer: weight + alpha / rank * up @ down.

    Attributes:
        name: Whose module it is; `part` is meaningless here.
        down: Info of the first matrix, (rank, in, ...).
        up: Info of the second matrix, (out, rank, ...).
        alpha: What the file says; None where it says nothing and every reader takes the rank.
    """

    name: TensorName
    down: TensorInfo
    up: TensorInfo
    alpha: float | None

    @property
    def rank(self) -> int:
        """Inner size of the pair."""
        return self.down.shape[0]


def lora_modules(header: AdapterHeader) -> tuple[LoraModule, ...]:
    """Every complete LoRA pair of the file, in the order of the header.

    Tensors that are not plain LoRA are left out; `other_tensors` lists them.

    Raises:
        AdapterError: Half of a pair is missing, the halves have different ranks, or an alpha is
            unreadable.
    """
    parts: dict[tuple[str, str], dict[Part, str]] = {}
    names: dict[tuple[str, str], TensorName] = {}
    for full_name in header.tensors:
        name = parse_name(full_name)
        if name.part == "other":
            continue
        key = (name.component, name.module)
        found = parts.setdefault(key, {})
        if name.part in found:
            raise AdapterError(
                f"{header.path}: two tensors are the {name.part} of {shown(name.module)}: "
                f"{shown(found[name.part])} and {shown(full_name)}; keep one"
            )
        found[name.part] = full_name
        names[key] = name
    tensor_alphas = header.read_scalars(f["alpha"] for f in parts.values() if "alpha" in f)
    config = lora_metadata(header)
    file_alpha = scalar_metadata_alpha(header)
    has_others = bool(other_tensors(header))
    modules = []
    for key, found in parts.items():
        if set(found) == {"alpha"} and has_others:
            continue  # the alpha of a LoKr, LoHa or the like
        down, up = _pair(header, names[key], found)
        alpha = config_alpha(config, names[key])
        if alpha is not None and is_rslora(config, names[key]):
            alpha *= math.sqrt(down.shape[0])
        if "alpha" in found:
            alpha = tensor_alphas[found["alpha"]]
        if alpha is None:
            alpha = file_alpha
        modules.append(LoraModule(names[key], down, up, alpha))
    return tuple(modules)


def other_tensors(header: AdapterHeader) -> tuple[str, ...]:
    """Names of the tensors that are not down, up or alpha of a LoRA."""
    return tuple(name for name in header.tensors if parse_name(name).part == "other")


def lora_metadata(header: AdapterHeader) -> dict[str, Any]:
    """diffusers' LoraConfig of the file, component prefixes kept; {} where there is none.

    Raises:
        AdapterError: The entry is there but is not a JSON object.
    """
    text = header.metadata.get(LORA_METADATA_KEY)
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise AdapterError(
            f"{header.path}: {LORA_METADATA_KEY} is not a JSON object; save the file again"
        )
    return config


def is_rslora(config: Mapping[str, Any], name: TensorName) -> bool:
    """Whether the LoraConfig scales by alpha / sqrt(rank) (arXiv:2312.03732)."""
    prefix = "" if name.component == DENOISER else f"{name.component}."
    return config.get(f"{prefix}use_rslora") is True


def scalar_metadata_alpha(header: AdapterHeader) -> float | None:
    """Alpha of the whole file from a plain metadata entry; None where there is none.

    diffusers reads `alpha` so for MiniMax-H3, others infer it from these three names. It counts
    only in files without a LoraConfig and without alpha tensors, which are the word of more tools.
    """
    if LORA_METADATA_KEY in header.metadata or any(n.endswith(".alpha") for n in header.tensors):
        return None
    for key in ALPHA_KEYS:
        try:
            alpha = float(header.metadata[key])
        except (KeyError, ValueError):
            continue
        if 0.0 < abs(alpha) < 1e30:
            return alpha
    return None


def _pair(
    header: AdapterHeader, name: TensorName, found: dict[Part, str]
) -> tuple[TensorInfo, TensorInfo]:
    missing = [part for part in ("down", "up") if part not in found]
    if missing:
        raise AdapterError(
            f"{header.path}: module {shown(name.module)} has no {' and no '.join(missing)} matrix; "
            "the file is incomplete, download or save it again"
        )
    down, up = header.tensors[found["down"]], header.tensors[found["up"]]
    if len(down.shape) < 2 or len(up.shape) < 2 or not down.shape[0] == up.shape[1] > 0:
        raise AdapterError(
            f"{header.path}: module {shown(name.module)} has down {list(down.shape)} and up "
            f"{list(up.shape)}; wanted (rank, in) and (out, rank) of one rank"
        )
    return down, up


def config_alpha(config: Mapping[str, Any], name: TensorName) -> float | None:
    """Alpha of one layer from what `lora_metadata` gives; None where it says nothing."""
    prefix = "" if name.component == DENOISER else f"{name.component}."
    alpha = config.get(f"{prefix}lora_alpha")
    pattern = config.get(f"{prefix}alpha_pattern")
    if isinstance(pattern, dict):
        # PEFT reads the keys as regexes; files are not trusted to run those, and real keys are
        # plain names, whole ("^" in front) or trailing parts.
        for key, value in pattern.items():
            plain = key.removeprefix("^")
            if name.module == plain or (key == plain and name.module.endswith(f".{plain}")):
                alpha = value
                break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
        return None
    return float(alpha)
