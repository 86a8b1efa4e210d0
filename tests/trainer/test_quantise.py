"""A packed base: near the plain one, smaller, and trained through as if it were plain."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fewstep.digits.models import build_autoencoder
from fewstep.digits.teachers import build_sd3
from fewstep.errors import ConfigError, MissingExtraError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.levels import Levels, levels_at
from fewstep.trainer.loop import advance
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.quantise import Int8Linear, packed_int8, packed_nf4, quantise, stored_bytes
from fewstep.trainer.roles import Role, role_checkpoint
from fewstep.trainer.setup import build_run
from tests.trainer.parallel_cases import config_for

torchao = pytest.importorskip("torchao")
CPU = torch.device("cpu")


def teacher(kind: str = "none") -> tuple[Backbone, Callable[[Role], Tensor]]:
    """An untrained digits teacher, packed or not, and a call of it."""
    torch.manual_seed(0)
    backbone = wrap_pipeline(build_sd3(build_autoencoder()), max_sequence_length=1)
    backbone.denoiser.requires_grad_(False)
    if kind != "none":
        quantise(backbone.denoiser, kind, CPU)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(4, *backbone.latent_shape(), generator=generator)
    levels = levels_at(backbone.schedule, torch.tensor([0.2, 0.5, 0.8, 0.95]))
    condition = backbone.encode(["seven", "three", "one", "two"])
    return backbone, lambda role: backbone.x0(role, sample, levels, condition)
