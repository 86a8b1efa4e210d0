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
    config_alphas = ConfigAlphas(config)
    file_alpha = scalar_metadata_alpha(header)
    has_others = bool(other_tensors(header))
    modules = []
    for key, found in parts.items():
        if set(found) == {"alpha"} and has_others:
            continue  # the alpha of a LoKr, LoHa or the like
        down, up = _pair(header, names[key], found)
        alpha = config_alphas.of(names[key])
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


class ConfigAlphas:
    """Alpha of every layer from a LoraConfig, as `lora_metadata` gives it.

    PEFT reads the keys of `alpha_pattern` as regexes; files are not trusted to run those, and real
    keys are plain names, whole ("^" in front) or trailing parts. They are indexed once, by their
    parts from the last to the first, so that a hostile file with many layers and many patterns
    takes time in proportion to its length. Of several that fit, the first of the file counts.

    Args:
        config: The LoraConfig; {} says nothing of any layer.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._patterns: dict[str, _Patterns] = {}

    def of(self, name: TensorName) -> float | None:
        """Alpha of one layer; None where the config says nothing."""
        prefix = "" if name.component == DENOISER else f"{name.component}."
        if prefix not in self._patterns:
            self._patterns[prefix] = _Patterns(self._config.get(f"{prefix}alpha_pattern"))
        found = self._patterns[prefix].first(name.module)
        alpha = self._config.get(f"{prefix}lora_alpha") if found is None else found[1]
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 1e30:
            return None
        return float(alpha)


class _Patterns:
    """The entries of one `alpha_pattern`: (place in the file, value)."""

    def __init__(self, patterns: object) -> None:
        self._whole: dict[str, tuple[int, Any]] = {}
        self._parts: dict[str | None, Any] = {}  # a tree; what ends at a node is at its None
        entries = patterns.items() if isinstance(patterns, dict) else ()
        for place, (key, value) in enumerate(entries):
            if key.startswith("^"):
                self._whole.setdefault(key.removeprefix("^"), (place, value))
                continue
            node = self._parts
            for part in reversed(key.split(".")):
                node = node.setdefault(part, {})
            node.setdefault(None, (place, value))

    def first(self, module: str) -> tuple[int, Any] | None:
        """The first entry that fits a module."""
        found = [self._whole[module]] if module in self._whole else []
        node = self._parts
        for part in reversed(module.split(".")):
            if part not in node:
                break
            node = node[part]
            if None in node:
                found.append(node[None])
        return min(found, key=lambda entry: entry[0], default=None)
