"""The judge of digit pictures: all the figures of a report, in the shipped classifier's features.

Knows nothing of pipelines: pictures and the labels they were asked for go in, scores come out.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional

from fewstep.digits.classifier import DigitClassifier, to_tensor
from fewstep.digits.data import load_digits
from fewstep.digits.weights import WEIGHTS
from fewstep.errors import ConfigError, ShapeError
from fewstep.metrics.diversity import intra_prompt_diversity
from fewstep.metrics.frechet import frechet_from_features
from fewstep.metrics.manifold import manifold_scores

CLASSIFIER_FILE = WEIGHTS / "classifier.safetensors"
BATCH_SIZE = 256


@dataclass(frozen=True, slots=True)
class Scores:
    """What the judge says about a set of pictures.

    Attributes:
        frechet: Frechet distance of the classifier's 64 features to the real pictures'.
        accuracy: Share of pictures recognised as the digit that was asked for.
        precision: See `ManifoldScores`, as the next three; k = 5.
        recall: Share of real pictures the set covers.
        density: As precision, but counted.
        coverage: As recall, but robust to outliers.
        diversity: Mean feature distance between two pictures of one prompt.
    """

    frechet: float
    accuracy: float
    precision: float
    recall: float
    density: float
    coverage: float
    diversity: float


@dataclass(frozen=True, slots=True)
class _Judged:
    """Pictures as the classifier sees them: features (N, 64), recognised (N,), labels (N,)."""

    features: np.ndarray
    recognised: np.ndarray
    labels: np.ndarray

    def take(self, index: np.ndarray) -> "_Judged":
        return _Judged(self.features[index], self.recognised[index], self.labels[index])


class DigitsJudge:
    """Scores pictures against all 1797 real digits; their features are computed once.

    Args:
        classifier_file: Weights of `DigitClassifier`; the shipped ones by default.

    Raises:
        ConfigError: The file is missing or does not hold this classifier.
        MissingExtraError: scikit-learn is not installed.
    """

    def __init__(self, classifier_file: Path = CLASSIFIER_FILE) -> None:
        self._classifier = load_classifier(classifier_file)
        digits = load_digits()
        self._real = self._look(digits.images, digits.labels)

    @property
    def num_real(self) -> int:
        """How many real pictures every set is compared with."""
        return len(self._real.labels)

    def score(self, images: np.ndarray, labels: np.ndarray) -> Scores:
        """Compare pictures with the real digits.

        Args:
            images: Shape (N, 64, 64, 3), uint8, at least two of each label.
            labels: Shape (N,), the digit each picture was asked to show; also its prompt group.

        Raises:
            ShapeError: Not uint8 pictures of that shape, or labels that do not fit.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ShapeError(
                f"got {images.dtype} pictures of shape {images.shape}; wanted uint8 (N, H, W, 3)"
            )
        if labels.shape != (len(images),):
            raise ShapeError(f"got {len(images)} pictures and labels of shape {labels.shape}")
        return _compare(self._real, self._look(images, labels))

    def floor(self, seed: int = 0) -> Scores:
        """Real against real: a random half of the real digits (898) judged by the other half (899).

        What no sampler can be expected to beat, up to sample size: a Frechet distance between
        finite sets is too large by about c * (1/N + 1/M), so a perfect sampler judged with
        2000 pictures against 1797 scores less than this; `frechet_floor` says how much. The
        nearest-neighbour figures also depend on how dense a set is (halves have larger balls).

        Args:
            seed: Which half.
        """
        order = np.random.default_rng(seed).permutation(self.num_real)
        half = self.num_real // 2
        return _compare(self._real.take(order[half:]), self._real.take(order[:half]))

    def frechet_floor(self, num_images: int, *, seed: int = 0, num_splits: int = 16) -> float:
        """The Frechet distance a perfect sampler would get with `num_images` pictures.

        The mean over random halves, scaled by (1/num_images + 1/1797) / (1/898 + 1/899): the
        leading term of the finite-sample bias. Bootstrap copies of the real pictures would not do:
        they are drawn from the very set they are compared with.

        Args:
            num_images: Pictures in the set the floor is for.
            seed: First split; the others follow.
            num_splits: How many random halves to average.
        """
        half = self.num_real // 2
        found = []
        for split in range(num_splits):
            order = np.random.default_rng([seed, split]).permutation(self.num_real)
            features = self._real.features[order]
            found.append(frechet_from_features(features[half:], features[:half]))
        of_halves = 1.0 / half + 1.0 / (self.num_real - half)
        return float(np.mean(found)) * (1.0 / num_images + 1.0 / self.num_real) / of_halves

    def features(self, images: np.ndarray) -> np.ndarray:
        """The classifier's features of pictures: uint8 (N, 64, 64, 3) to float32 (N, 64)."""
        return self._look(images, np.zeros(len(images), np.int64)).features

    @torch.no_grad()
    def _look(self, images: np.ndarray, labels: np.ndarray) -> _Judged:
        features, recognised = [], []
        for start in range(0, len(images), BATCH_SIZE):
            found = self._classifier.features(to_tensor(images[start : start + BATCH_SIZE]))
            features.append(found)
            recognised.append(self._classifier.head(functional.relu(found)).argmax(dim=1))
        return _Judged(torch.cat(features).numpy(), torch.cat(recognised).numpy(), labels)


def _compare(real: _Judged, judged: _Judged) -> Scores:
    manifold = manifold_scores(real.features, judged.features)
    return Scores(
        frechet=frechet_from_features(real.features, judged.features),
        accuracy=float(np.mean(judged.recognised == judged.labels)),
        precision=manifold.precision,
        recall=manifold.recall,
        density=manifold.density,
        coverage=manifold.coverage,
        diversity=intra_prompt_diversity(judged.features, judged.labels),
    )


def load_classifier(file: Path) -> DigitClassifier:
    if not file.is_file():
        raise ConfigError(
            f"the classifier {file} does not exist; reinstall fewstep or make it with: "
            "python -m fewstep.digits.train"
        )
    model = DigitClassifier()
    try:
        model.load_state_dict(load_file(file))  # copies fp16 weights into fp32 ones
    except Exception as error:  # safetensors and torch raise their own kinds
        raise ConfigError(f"{file} does not hold the digits classifier ({error})") from error
    return model.eval()
