"""Names of a policy head's tensors in a file: ours, and those of pi-Flow's authors.

ours     policy.means.weight, policy.logweights.weight, policy.logstds.<i>.weight, and more
theirs   proj_out_means.weight, proj_out_logweights.weight, proj_out_logstds.<2i + 1>.weight,
         norm_out.linear.weight beside them; of a dx policy proj_out.weight, where the metadata's
         policy_config says so

Theirs may have "transformer." in front. Without such a tensor a file has no policy head, and a
whole `norm_out` or `proj_out` is no more than a tensor that is no LoRA.
"""

import json
import re
from collections.abc import Iterable, Mapping

POLICY = "policy."
CONFIG_KEY = "policy_config"
"""Metadata of the authors' export: {"type": "GMFlow"} or {"type": "DX", "segment_size": ...}."""
_THEIRS = re.compile(r"(?:transformer\.)?(proj_out_means|proj_out_logweights)\.(weight|bias)")
_LAYERS = re.compile(r"(?:transformer\.)?proj_out_logstds\.(\d{1,3})\.(weight|bias)")
_BESIDE = re.compile(r"(?:transformer\.)?norm_out\.linear\.(weight|bias)")
_DX = re.compile(r"(?:transformer\.)?proj_out\.(weight|bias)")


def policy_names(names: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Parameter of the head -> tensor name; {} where a file has no policy head.

    Args:
        names: Tensor names of the file.
        metadata: Of the file.
    """
    listed = list(names)
    is_dx = _is_dx(metadata)
    found = {name: _plain(name, is_dx=is_dx) for name in listed}
    head = {plain: name for name, plain in found.items() if plain is not None}
    if "means.weight" in head:  # the norm comes along with a head, and is none by itself
        beside = {f"norm_out.{m[1]}": name for name in listed if (m := _BESIDE.fullmatch(name))}
        return {**beside, **head}
    return head


def is_polynomial(metadata: Mapping[str, str]) -> bool:
    """Whether the authors' export says that its dx policy is a polynomial in time."""
    return _config(metadata).get("mode") == "polynomial"


def _plain(name: str, *, is_dx: bool) -> str | None:
    if name.startswith(POLICY):
        return name.removeprefix(POLICY)
    if match := _THEIRS.fullmatch(name):
        return f"{match[1].removeprefix('proj_out_')}.{match[2]}"
    if match := _LAYERS.fullmatch(name):  # a silu before each of them is counted there
        return f"logstds.{(int(match[1]) - 1) // 2}.{match[2]}" if int(match[1]) % 2 else None
    if is_dx and (match := _DX.fullmatch(name)):
        return f"means.{match[1]}"
    return None


def _is_dx(metadata: Mapping[str, str]) -> bool:
    return _config(metadata).get("type") == "DX"


def _config(metadata: Mapping[str, str]) -> Mapping[str, object]:
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}  # of no tool that we know
    return config if isinstance(config, dict) else {}
