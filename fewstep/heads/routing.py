"""Which of several students a prompt belongs to: the one with the nearest centroid.

    embedding = mean over the prompt's tokens of what the denoiser is given (encoder_hidden_states)
    route     = the nearest centroid, by Euclidean distance

A centroid is the mean embedding of a student's training prompts; the file keeps it as
`route.<name>.centroid`.

Source:
    Song et al. 2024 (MSD, multi-student distillation), arXiv:2410.23274: a student for each group
    of conditions. Grouping by embedding is ours.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import ShapeError

MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
"""Arguments of diffusers' denoisers that mark the tokens of `encoder_hidden_states`."""


def prompt_embedding(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """One vector per prompt.

    Args:
        tokens: Text embeddings as the denoiser gets them. Shape (B, tokens, width), any dtype.
        mask: Shape (B, tokens); tokens of 0 do not count. None counts all.

    Returns:
        Shape (B, width), float32.

    Raises:
        ShapeError: The embeddings are not a sequence of tokens.
    """
    if tokens.ndim != 3:
        raise ShapeError(
            f"a prompt's embedding is the mean of its tokens (B, tokens, width), got "
            f"{tuple(tokens.shape)}"
        )
    wide = tokens.float()
    if mask is None or mask.shape != tokens.shape[:2]:
        return wide.mean(1)
    weights = mask.to(wide)[:, :, None]
    return (wide * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def nearest(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each embedding; of two equally near the first.

    Args:
        embeddings: Shape (B, width).
        centroids: Shape (routes, width).

    Returns:
        Positions, shape (B,), int64.

    Raises:
        ShapeError: The widths differ.
    """
    if embeddings.shape[1] != centroids.shape[1]:
        raise ShapeError(
            f"prompt embeddings have width {embeddings.shape[1]}, the centroids "
            f"{centroids.shape[1]}; use the base these routes were made on"
        )
    differences = embeddings.float()[:, None] - centroids.to(embeddings.device).float()[None]
    return differences.square().sum(2).argmin(1)


def embedding_of_call(arguments: Mapping[str, Any]) -> Tensor:
    """The embedding of each picture's prompt in one call of a denoiser.

    Args:
        arguments: Parameter name -> value, as diffusers' denoisers name them.

    Returns:
        Shape (B, width), float32.

    Raises:
        ShapeError: The call has no text embeddings.
    """
    tokens = arguments.get("encoder_hidden_states")
    if isinstance(tokens, Tensor):
        masks = (arguments.get(name) for name in MASKS)
        mask = next((one for one in masks if isinstance(one, Tensor)), None)
        return prompt_embedding(tokens, mask)
    features = arguments.get("cap_feats")  # Z-Image: a list of (tokens, width), not padded
    if isinstance(features, list) and features:
        return torch.cat([prompt_embedding(one[None]) for one in features])
    raise ShapeError(
        "the denoiser was called without text embeddings (encoder_hidden_states), so no route can "
        "be chosen; call the pipeline with a prompt"
    )
