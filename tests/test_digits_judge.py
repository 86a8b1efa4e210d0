"""Facts about the judge of digit pictures, on the shipped classifier and the real digits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.digits.classifier import to_tensor
from fewstep.digits.data import load_digits
from fewstep.digits.judge import DigitsJudge
from fewstep.errors import ConfigError, ShapeError
from fewstep.metrics.frechet import frechet_from_features


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return DigitsJudge()


def one_per_class() -> np.ndarray:
    labels = load_digits().labels
    return np.array([np.flatnonzero(labels == label)[0] for label in range(10)])


class TestJudge:
    def test_the_real_digits_are_perfect(self, judge: DigitsJudge) -> None:
        digits = load_digits()
        found = judge.score(digits.images, digits.labels)
        assert found.frechet < 1e-6
        assert found.accuracy > 0.99
        assert (found.precision, found.recall, found.coverage) == (1.0, 1.0, 1.0)

    def test_pictures_the_classifier_never_saw_are_recognised(self, judge: DigitsJudge) -> None:
        held_out = load_digits().held_out()
        assert judge.score(held_out.images, held_out.labels).accuracy >= 0.97

    def test_a_collapsed_sampler_is_accurate_but_has_no_diversity_or_recall(
        self, judge: DigitsJudge
    ) -> None:
        digits, chosen = load_digits(), np.repeat(one_per_class(), 20)
        found = judge.score(digits.images[chosen], digits.labels[chosen])
        assert found.accuracy >= 0.9  # the first scan of one class is an odd one
        assert found.diversity == 0.0
        assert found.recall == 0.0
        assert found.frechet > 20.0

    def test_the_wrong_digit_is_not_accurate(self, judge: DigitsJudge) -> None:
        digits = load_digits()
        shifted = judge.score(digits.images[:400], (digits.labels[:400] + 1) % 10)
        assert shifted.accuracy < 0.02

    def test_noise_is_not_handwriting(self, judge: DigitsJudge) -> None:
        images = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3)).astype(np.uint8)
        found = judge.score(images, np.arange(200) % 10)
        assert found.accuracy < 0.3
        assert found.precision < 0.05
        assert found.frechet > 50.0

    def test_blurred_digits_score_worse_than_sharp_ones(self, judge: DigitsJudge) -> None:
        digits = load_digits()
        small = torch.nn.functional.avg_pool2d(to_tensor(digits.images), 16)
        large = torch.nn.functional.interpolate(small, scale_factor=16.0)
        blurred = ((large + 1.0) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        assert judge.score(blurred, digits.labels).frechet > 3.0 * judge.floor().frechet

    def test_the_floor_is_small_repeatable_and_depends_on_the_split(
        self, judge: DigitsJudge
    ) -> None:
        floor = judge.floor(seed=0)
        assert 0.1 < floor.frechet < 5.0
        assert min(floor.accuracy, floor.precision, floor.recall, floor.coverage) > 0.9
        assert judge.floor(seed=0) == floor
        assert judge.floor(seed=1) != floor

    def test_the_floor_for_other_sizes_follows_the_measured_bias(self, judge: DigitsJudge) -> None:
        """300 against 1497 real pictures, measured; and what the halves predict for it."""
        digits = load_digits()
        features = judge.features(digits.images)
        measured = []
        for split in range(10):
            order = np.random.default_rng(split).permutation(len(features))
            measured.append(frechet_from_features(features[order[:300]], features[order[300:]]))
        of_halves = judge.frechet_floor(1000) / (1 / 1000 + 1 / judge.num_real)
        predicted = of_halves * (1 / 300 + 1 / 1497)
        assert np.mean(measured) == pytest.approx(predicted, rel=0.25)

    def test_more_pictures_have_a_lower_floor(self, judge: DigitsJudge) -> None:
        floors = [judge.frechet_floor(count, num_splits=4) for count in (500, 2000, 10**9)]
        assert floors[0] > floors[1] > floors[2] > 0.0

    def test_bad_pictures_are_refused(self, judge: DigitsJudge) -> None:
        with pytest.raises(ShapeError, match="wanted uint8"):
            judge.score(np.zeros((20, 64, 64, 3), np.float32), np.zeros(20))
        with pytest.raises(ShapeError, match="labels"):
            judge.score(np.zeros((20, 64, 64, 3), np.uint8), np.zeros(19))

    def test_a_missing_or_foreign_classifier_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "classifier.safetensors"
        with pytest.raises(ConfigError, match="does not exist"):
            DigitsJudge(file)
        file.write_bytes(b"not safetensors")
        with pytest.raises(ConfigError, match="does not hold"):
            DigitsJudge(file)
