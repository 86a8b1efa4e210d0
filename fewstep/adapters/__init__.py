"""Adapter files: read, check against a base, write and describe. Importing this needs no torch.

A few-step adapter is a safetensors file of LoRA weights with its recipe in the metadata.
`open_adapter` and everything built on it touch only the header and the few alpha scalars, so they
are fast on files of any size; `check_values` and `preflight` also read every number once. Only the
`save_` functions import torch, when they are called, and `open_adapter` on a pickle it never saw.
"""

from fewstep.adapters.base_shapes import base_shapes_of_folder, denoiser_shapes
from fewstep.adapters.coverage import Coverage, check_coverage
from fewstep.adapters.expert_tags import ExpertTag, expert_tag
from fewstep.adapters.head_writer import (
    RouteWeights,
    save_lorad_adapter,
    save_routed_adapter,
    save_two_time_adapter,
)
from fewstep.adapters.header import AdapterHeader, TensorInfo, read_header
from fewstep.adapters.inspection import AdapterReport, inspect_adapter
from fewstep.adapters.kinds import AdapterParts, adapter_parts
from fewstep.adapters.modules import LoraModule, lora_modules
from fewstep.adapters.opening import open_adapter
from fewstep.adapters.policy_writer import save_policy_adapter
from fewstep.adapters.preflight import PreflightReport, preflight
from fewstep.adapters.values import check_values
from fewstep.adapters.writer import Component, save_adapter

__all__ = [
    "AdapterHeader",
    "AdapterParts",
    "AdapterReport",
    "Component",
    "Coverage",
    "ExpertTag",
    "LoraModule",
    "PreflightReport",
    "RouteWeights",
    "TensorInfo",
    "adapter_parts",
    "base_shapes_of_folder",
    "check_coverage",
    "check_values",
    "denoiser_shapes",
    "expert_tag",
    "inspect_adapter",
    "lora_modules",
    "open_adapter",
    "preflight",
    "read_header",
    "save_adapter",
    "save_lorad_adapter",
    "save_policy_adapter",
    "save_routed_adapter",
    "save_two_time_adapter",
]
