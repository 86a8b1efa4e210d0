"""The frozen base of a run: loaded, packed or cut as its settings say, on its device."""

import torch
from torch import nn

from fewstep.trainer.agreement import agree_on_weights
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.loading import load_backbone
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.parallel import Processes
from fewstep.trainer.quantise import quantise
from fewstep.trainer.sharding import shard

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(
    source: str, config: TrainConfig, processes: Processes, device: torch.device
) -> Backbone:
    """Load a pipeline for training.

    Args:
        source: Folder or hub id.
        config: Precision, packing, cutting.
        processes: This one among its peers.
        device: Where its networks go.

    Raises:
        ConfigError: It cannot be loaded, packed or cut, or processes loaded different weights.
        MissingExtraError: The library that packs is not installed.
    """
    is_plain = config.quantise == "none" and not config.shard
    backbone = load_backbone(
        source,
        precision=PRECISIONS[config.precision],
        device=device if is_plain else torch.device("cpu"),
        max_sequence_length=config.max_sequence_length,
    )
    agree_on_weights(backbone, processes)
    if config.quantise != "none":
        quantise(backbone.denoiser, config.quantise, device)
    elif config.shard:
        shard(backbone, processes, device)
    if not is_plain:
        _move_the_rest(backbone, device)
    return backbone


def _move_the_rest(backbone: Backbone, device: torch.device) -> None:
    """Text encoders and decoder; the denoiser is where it should be."""
    placed = set(backbone.denoiser.modules())
    for part in backbone.pipe.components.values():
        if isinstance(part, nn.Module) and part not in placed:
            part.to(device)
