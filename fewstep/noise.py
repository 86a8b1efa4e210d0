"""The portable noise stream: the same standard normals for the same seed on every host.

The stream is torch's CPU generator (what ComfyUI and diffusers users expect), reproduced here in
numpy so that a runtime without torch draws the same pictures. One stream per image, so a picture
does not depend on its batch mates: the initial noise first, then one draw per re-noising step.

Source of the sequence (re-derived from torch 2.13's behaviour and checked against it in tests):
MT19937 with the scalar seeding; 16 values and more: float32 uniforms of 24 bits, Box-Muller in
blocks of 16; fewer: one by one in float64 from 53-bit uniforms.
"""

import math
from collections.abc import Sequence

import numpy as np

from fewstep.errors import ConfigError

BLOCK = 16
MAX_SEED = 2**64 - 1


class PortableNoise:
    """One image's noise stream. Draws equal `torch.randn(shape, generator=manual_seed(seed))`.

    Args:
        seed: 0 to 2**64 - 1 (torch's CPU generator uses the lower 32 bits).

    Raises:
        ConfigError: The seed is out of range.
    """

    def __init__(self, seed: int) -> None:
        _check_seed(seed)
        self._bits = np.random.MT19937()
        np.random.RandomState(self._bits).seed(int(seed) & 0xFFFFFFFF)  # seeds it as torch does
        self._kept: float | None = None

    def draw(self, shape: Sequence[int]) -> np.ndarray:
        """The next standard normals of the stream, float32, of any shape."""
        count = math.prod(shape)
        values = self._scalars(count) if count < BLOCK else self._blocks(count)
        return values.reshape(shape)

    def _blocks(self, count: int) -> np.ndarray:
        values = self._uniforms(count)
        whole = count - count % BLOCK
        normal = np.empty(count, np.float32)
        normal[:whole] = _box_muller(values[:whole])
        if whole != count:  # torch re-draws the last 16 so that the tail is a block too
            normal[-BLOCK:] = _box_muller(self._uniforms(BLOCK))
        return normal

    def _uniforms(self, count: int) -> np.ndarray:
        raw = self._bits.random_raw(count).astype(np.uint32) & np.uint32(0xFFFFFF)
        return raw.astype(np.float32) / np.float32(2**24)

    def _scalars(self, count: int) -> np.ndarray:
        return np.array([self._scalar() for _ in range(count)], np.float32)

    def _scalar(self) -> float:
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        angle = 2.0 * math.pi * self._uniform53()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform53()))
        self._kept = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _uniform53(self) -> float:
        high, low = (int(r) for r in self._bits.random_raw(2))
        return (((high << 32) | low) & (2**53 - 1)) / 2.0**53


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Blocks of 16 uniforms to 16 normals: radius from the first eight, angle from the last."""
    first, last = np.moveaxis(uniforms.reshape(-1, 2, BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - first))
    angle = np.float32(2.0 * math.pi) * last
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both.reshape(-1)


class NoiseBatch:
    """The streams of a batch: image i of the batch always draws from its own seed.

    Args:
        seeds: One seed per image, at least one.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if not seeds:
            raise ConfigError("a batch of noise needs at least one seed, got none")
        self._streams = [PortableNoise(seed) for seed in seeds]

    def draw(self, shape: Sequence[int]) -> np.ndarray:
        """The next draw of every stream, shape (len(seeds), *shape), float32."""
        return np.stack([stream.draw(shape) for stream in self._streams])


def image_seeds(seed: int, num_images: int) -> tuple[int, ...]:
    """Seeds of a request for several images: seed, seed + 1, ... (wrapping at 2**64)."""
    _check_seed(seed)
    return tuple((seed + i) % (MAX_SEED + 1) for i in range(num_images))


def _check_seed(seed: int) -> None:
    is_whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not is_whole or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
