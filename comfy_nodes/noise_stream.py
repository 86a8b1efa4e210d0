"""Whose noise a sampler draws: the streams FewStepPipeline draws from, or ComfyUI's own.

A stream is one float32 CPU generator that gives the initial noise first, then one draw per
re-noising step. A sampler is handed the initial noise by somebody else, so its streams begin after
that draw. Torch alone, but for ComfyUI's own noise.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.noise import MAX_SEED

Draw = Callable[[], Tensor]
"""The next standard normals of a stream, shape and device of the sample, float32."""

Streams = Callable[[int, Tensor], Draw]
"""(seed, initial noise) -> the streams of a batch, after that noise was drawn from them."""


def batch_stream(seed: int, noise: Tensor) -> Draw:
    """One stream for the whole batch, as ComfyUI's RandomNoise draws: it is continued here.

    A batch of one equals FewStepPipeline; pictures of a larger one depend on their batch mates.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = _draw(lambda: _normal(noise.shape, generator), noise)
    draw()
    return draw


def image_streams(indices: Sequence[int] | None = None) -> Streams:
    """One stream per picture, seeded seed, seed + 1, ...: a batch of any size as FewStepPipeline.

    Args:
        indices: Which pictures of a larger batch these are (a latent's `batch_index`); None means
            the first ones.
    """

    def begin(seed: int, noise: Tensor) -> Draw:
        draw = _images(seed, noise, indices)
        draw()
        return draw

    return begin


def first_noise(seed: int, latents: Tensor, indices: Sequence[int] | None = None) -> Tensor:
    """The initial noise of `image_streams`, on the CPU.

    Args:
        seed: Of the first picture.
        latents: What is sampled, shape (B, ...).
        indices: As in `image_streams`.
    """
    return _images(seed, latents.cpu(), indices)()


def core_stream(seed: int, noise: Tensor) -> Draw:
    """Fresh noise as ComfyUI's own samplers draw it: on the sample's device, other per device."""
    from comfy.k_diffusion import sampling  # pyright: ignore[reportMissingImports]

    sampler = sampling.default_noise_sampler(noise, seed=seed)
    return lambda: sampler(None, None)


REPRODUCIBLE = "reproducible (CPU)"
COMFYUI = "ComfyUI default"
STREAMS: dict[str, Streams] = {REPRODUCIBLE: batch_stream, COMFYUI: core_stream}
"""What nodes offer; reproducible first."""


def streams_of(name: str) -> Streams:
    """The streams of a name.

    Raises:
        ConfigError: There are none.
    """
    if name not in STREAMS:
        raise ConfigError(f'noise "{name}" is unknown; use {" or ".join(map(repr, STREAMS))}')
    return STREAMS[name]


def _images(seed: int, like: Tensor, indices: Sequence[int] | None) -> Draw:
    count = like.shape[0]
    chosen = range(count) if indices is None else indices
    if len(chosen) != count:
        raise ConfigError(
            f"the latent has {count} pictures but a batch_index of {len(chosen)}; remake the batch"
        )
    generators = [
        torch.Generator("cpu").manual_seed((seed + index) % (MAX_SEED + 1)) for index in chosen
    ]
    shape = (1, *like.shape[1:])
    return _draw(lambda: torch.cat([_normal(shape, one) for one in generators]), like)


def _draw(make: Draw, like: Tensor) -> Draw:
    return lambda: make().to(like.device)


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
