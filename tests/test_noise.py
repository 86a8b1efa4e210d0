"""fewstep/noise.py: the stream is torch's CPU generator, seed for seed and draw for draw."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fewstep.errors import ConfigError
from fewstep.noise import NoiseBatch, PortableNoise, image_seeds

SEEDS = [0, 1, 2**32 - 1, 2**33 + 5, 2**64 - 1]
TOLERANCE = 5e-7
"""torch's vectorised log, cosine and sine differ from numpy's in the last bit or two."""


def torch_draws(seed: int, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(*shape, generator=generator).numpy() for shape in shapes]


def check(seed: int, shapes: Sequence[Sequence[int]]) -> None:
    stream = PortableNoise(seed)
    for shape, expected in zip(shapes, torch_draws(seed, shapes), strict=True):
        drawn = stream.draw(shape)
        assert drawn.dtype == np.float32
        assert drawn.shape == tuple(shape)
        np.testing.assert_allclose(drawn, expected, rtol=1e-6, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [*range(1, 41), 100, 1024, 16384])
def test_any_size_equals_torch(seed: int, count: int) -> None:
    check(seed, [(count,), (count,)])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sequence_of_mixed_sizes_equals_torch(seed: int) -> None:
    check(seed, [(3,), (20,), (1,), (16,), (5,), (17,), (15,), (2, 2), (4, 8, 8), (1,)])


def test_latent_shapes_over_a_whole_trajectory_equal_torch() -> None:
    check(7, [(1, 4, 64, 64)] * 4)


def test_a_seed_counts_by_its_lower_32_bits_as_in_torch() -> None:
    same = PortableNoise(5).draw((64,))
    np.testing.assert_array_equal(PortableNoise(2**33 + 5).draw((64,)), same)
    assert not np.array_equal(PortableNoise(6).draw((64,)), same)


def test_noise_is_standard_normal_and_finite() -> None:
    values = PortableNoise(3).draw((1_000_001,)).astype(np.float64)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.004
    assert abs(values.std() - 1.0) < 0.003


def test_an_empty_draw_takes_nothing_from_the_stream() -> None:
    stream = PortableNoise(1)
    assert stream.draw((0, 4)).shape == (0, 4)
    np.testing.assert_array_equal(stream.draw((32,)), PortableNoise(1).draw((32,)))


def test_a_picture_does_not_depend_on_its_batch_mates() -> None:
    shape = (4, 8, 8)
    alone, pair = NoiseBatch([11]), NoiseBatch([5, 11])
    for _ in range(3):
        np.testing.assert_array_equal(alone.draw(shape)[0], pair.draw(shape)[1])


def test_a_batch_has_one_stream_per_seed() -> None:
    drawn = NoiseBatch([1, 2, 1]).draw((16,))
    assert drawn.shape == (3, 16)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])
    with pytest.raises(ConfigError, match="needs at least one seed, got none"):
        NoiseBatch([])


def test_seeds_of_several_images_count_up_and_wrap() -> None:
    assert image_seeds(7, 3) == (7, 8, 9)
    assert image_seeds(2**64 - 2, 4) == (2**64 - 2, 2**64 - 1, 0, 1)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", True, None])
def test_a_bad_seed_is_named(seed: int) -> None:
    for use in (PortableNoise, lambda bad: image_seeds(bad, 2)):
        with pytest.raises(ConfigError) as caught:
            use(seed)
        wanted = f"seed must be a whole number from 0 to 2**64 - 1, got {seed!r}"
        assert str(caught.value) == wanted


def test_numpy_integers_are_seeds_too() -> None:
    drawn = PortableNoise(int(np.int64(9))).draw((16,))
    np.testing.assert_array_equal(NoiseBatch([np.uint64(9)]).draw((16,))[0], drawn)  # pyright: ignore
