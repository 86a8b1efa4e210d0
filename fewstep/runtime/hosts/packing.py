"""2x2 patches of latents as tokens, as FLUX and Qwen-Image pack them."""

import numpy as np

PATCH = 2


def pack(latents: np.ndarray) -> np.ndarray:
    """(B, C, h, w) as (B, h / 2 * w / 2, 4 C); h and w even."""
    _, channels, height, width = latents.shape
    rows, columns = height // PATCH, width // PATCH
    cut = latents.reshape(-1, channels, rows, PATCH, columns, PATCH)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, rows * columns, channels * PATCH**2)


def unpack(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """The inverse: (B, h / 2 * w / 2, 4 C) as (B, C, h, w)."""
    channels = tokens.shape[-1] // PATCH**2
    rows, columns = height // PATCH, width // PATCH
    cut = tokens.reshape(-1, rows, columns, channels, PATCH, PATCH)
    return cut.transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
