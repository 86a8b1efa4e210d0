"""Facts about picture sizes."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import ConfigError
from fewstep.trainer.data.buckets import (
    WeightedSize,
    aspect_buckets,
    fit,
    nearest_bucket,
    random_shapes,
)

# Podell et al. 2023, arXiv:2307.01952, appendix I: the heights of each width.
SDXL = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024, 960),
    1088: (960, 896),
    1152: (896, 832),
    1216: (832,),
    1280: (768,),
    1344: (768, 704),
    1408: (704,),
    1472: (704,),
    1536: (640,),
    1600: (640,),
    1664: (576,),
    1728: (576,),
    1792: (576,),
    1856: (512,),
    1920: (512,),
    1984: (512,),
    2048: (512,),
}


class TestBuckets:
    @pytest.mark.parametrize(
        ("area_px", "step_px", "max_aspect"),
        [(1024 * 1024, 64, 4.0), (512 * 512, 16, 2.0), (700_000, 32, 3.0), (64 * 64, 64, 1.0)],
    )
    def test_sizes_keep_their_promises(self, area_px: int, step_px: int, max_aspect: float) -> None:
        found = aspect_buckets(area_px, step_px=step_px, max_aspect=max_aspect)
        assert len(set(found)) == len(found)
        assert {(width, height) for height, width in found} == set(found)
        assert any(height == width for height, width in found)
        for height, width in found:
            assert height % step_px == 0
            assert width % step_px == 0
            assert height * width <= area_px
            assert max(height, width) <= max_aspect * min(height, width)
        aspects = [width / height for height, width in found]
        assert aspects == sorted(aspects)

    def test_the_sizes_of_one_megapixel_are_among_sdxls(self) -> None:
        published = {(height, width) for width, heights in SDXL.items() for height in heights}
        found = set(aspect_buckets(1024 * 1024, step_px=64, max_aspect=4.0))
        assert len(found) >= 31
        assert found <= published

    def test_aspect_one_is_the_square_alone(self) -> None:
        assert aspect_buckets(600_000, step_px=64, max_aspect=1.0) == ((768, 768),)

    def test_settings_that_give_no_size_are_told(self) -> None:
        with pytest.raises(ConfigError, match="area_px is 4095, less than one square of 64 px"):
            aspect_buckets(4095, step_px=64, max_aspect=2.0)
        with pytest.raises(ConfigError, match="step_px >= 1 and max_aspect >= 1, got 64 and 0.5"):
            aspect_buckets(4096, step_px=64, max_aspect=0.5)


class TestAssignment:
    BUCKETS = ((128, 32), (96, 48), (64, 64), (48, 96), (32, 128))

    @pytest.mark.parametrize("bucket", BUCKETS)
    def test_a_picture_of_a_buckets_aspect_goes_there_at_any_size(
        self, bucket: tuple[int, int]
    ) -> None:
        height, width = bucket
        assert nearest_bucket(7 * height, 7 * width, self.BUCKETS) == bucket
        assert nearest_bucket(height // 16, width // 16, self.BUCKETS) == bucket

    def test_distance_is_by_ratio_not_by_difference(self) -> None:
        # An aspect of 3: 2 is nearer by difference than by ratio; 4 is nearer by ratio.
        assert nearest_bucket(100, 290, ((48, 96), (32, 128))) == (32, 128)
        assert nearest_bucket(100, 280, ((48, 96), (32, 128))) == (48, 96)
        assert nearest_bucket(290, 100, ((96, 48), (128, 32))) == (128, 32)

    def test_of_equal_aspects_the_largest(self) -> None:
        assert nearest_bucket(10, 10, ((32, 32), (64, 64), (48, 48))) == (64, 64)

    def test_fit_crops_the_middle_and_never_stretches(self) -> None:
        pixels = np.zeros((40, 100, 3), np.uint8)
        pixels[:, 30:70] = 255  # a white square in the middle of a wide picture
        found = np.asarray(fit(Image.fromarray(pixels), (20, 20)))
        assert found.shape == (20, 20, 3)
        assert found[2:-2, 2:-2].min() > 250  # Lanczos sees a little beyond the edges

    def test_fit_of_the_same_size_is_the_same_picture(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
        assert np.array_equal(np.asarray(fit(Image.fromarray(pixels), (24, 16))), pixels)


class TestRandomShapes:
    SIZES = (WeightedSize(64, 64, 3.0), WeightedSize(32, 128), WeightedSize(128, 32))

    def test_sizes_come_by_weight(self) -> None:
        drawn = random_shapes(self.SIZES, 5000, torch.Generator().manual_seed(0))
        counts = Counter(drawn)
        assert counts[64, 64] == pytest.approx(3000, abs=150)  # 4 deviations
        assert counts[32, 128] == pytest.approx(1000, abs=120)

    def test_the_generator_is_the_only_randomness(self) -> None:
        first = random_shapes(self.SIZES, 20, torch.Generator().manual_seed(1))
        assert first == random_shapes(self.SIZES, 20, torch.Generator().manual_seed(1))
        assert first != random_shapes(self.SIZES, 20, torch.Generator().manual_seed(2))

    def test_wrong_sizes_are_told(self) -> None:
        with pytest.raises(ConfigError, match="a size must be positive, got 0 x 64 px"):
            WeightedSize(0, 64)
        with pytest.raises(ConfigError, match="weight of a size must be a number above 0, got nan"):
            WeightedSize(64, 64, float("nan"))
        with pytest.raises(ConfigError, match="no sizes were given"):
            random_shapes((), 1, torch.Generator())
