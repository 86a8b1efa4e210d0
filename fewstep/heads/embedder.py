"""Where a denoiser embeds its timestep: the place a two-time head is added to."""

from dataclasses import dataclass

from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder as ZImageEmbedder
from torch import nn

from fewstep.errors import ShapeError

NAMES = ("time_embedding", "timestep_embedder", "time_embedder", "t_embedder")
"""What diffusers' models call it. Their other modules of the same class embed guidance, sizes,
pooled text, or a second time of their own."""


@dataclass(frozen=True, slots=True)
class EmbedderPlace:
    """The module from a timestep's sinusoid to the hidden size.

    Attributes:
        path: Its name in the model.
        module: Itself.
        width: Size of what it gives.
    """

    path: str
    module: nn.Module
    width: int


def timestep_embedder(model: nn.Module) -> EmbedderPlace:
    """Where a denoiser of diffusers embeds its timestep.

    Raises:
        ShapeError: There is no such module, or more than one (audio beside video).
    """
    found = []
    for path, module in model.named_modules():
        width = _width(module)
        if width is not None and path.rpartition(".")[2] in NAMES:
            found.append(EmbedderPlace(path, module, width))
    if len(found) != 1:
        many = f"{len(found)} ({', '.join(place.path for place in found)})" if found else "none"
        raise ShapeError(
            f"{type(model).__name__} has {many} of the timestep embeddings that a two-time head "
            f"can be added to, wanted one named {' or '.join(NAMES)}"
        )
    return found[0]


def _width(module: nn.Module) -> int | None:
    if isinstance(module, TimestepEmbedding):
        return int(module.linear_2.out_features)  # a LoRA layer in its place says the same
    if isinstance(module, ZImageEmbedder):
        return int(module.mlp[-1].out_features)  # pyright: ignore[reportArgumentType]
    return None
