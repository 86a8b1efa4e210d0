"""The real data of the digits pipeline: scikit-learn's handwritten digits as 64 px RGB pictures.

The 1797 scans (8x8 pixels, 16 grey levels, UCI "Optical Recognition of Handwritten Digits") are
enlarged with Lanczos interpolation and shown as dark ink on white paper. Knows nothing of models.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fewstep.errors import MissingExtraError

IMAGE_SIZE_PX = 64
NUM_CLASSES = 10
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a handwritten {word}",
    "a handwritten {figure}",
    "handwritten {word}",
    "the digit {word}",
    "the digit {figure}",
    "{word}",
    "{figure}",
)
HELD_OUT_EVERY = 5
"""Every fifth scan is kept from the classifier: its accuracy is measured on those."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Pictures and labels of the real scans.

    Attributes:
        images: Shape (N, 64, 64, 3), uint8, dark ink on white.
        labels: Shape (N,), int64, 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray

    def held_out(self) -> "Digits":
        """The fifth of the data the classifier has never seen."""
        return Digits(self.images[::HELD_OUT_EVERY], self.labels[::HELD_OUT_EVERY])

    def train(self) -> "Digits":
        """The four fifths the classifier was trained on."""
        keep = np.arange(len(self.labels)) % HELD_OUT_EVERY != 0
        return Digits(self.images[keep], self.labels[keep])


def load_digits() -> Digits:
    """Read the scans from scikit-learn and enlarge them to 64 px.

    Returns:
        All 1797 pictures in scikit-learn's order.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as read_scans
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    values, labels = read_scans(return_X_y=True)
    images = np.stack([_enlarge(scan) for scan in np.asarray(values).reshape(-1, 8, 8)])
    return Digits(images, np.asarray(labels, dtype=np.int64))


def _enlarge(scan: np.ndarray) -> np.ndarray:
    """One 8x8 scan of values 0 (paper) to 16 (ink) as a 64x64 RGB picture."""
    grey = np.round(255.0 * (1.0 - scan / 16.0)).astype(np.uint8)
    large = Image.fromarray(grey).resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.LANCZOS)
    return np.repeat(np.asarray(large)[..., None], 3, axis=-1)


def prompt_for(label: int, template: str = TEMPLATES[0]) -> str:
    """The prompt that asks for a digit, for example "a handwritten seven"."""
    return template.format(word=WORDS[label], figure=label)


def all_prompts() -> list[tuple[str, int]]:
    """Every (prompt, label) the teachers were trained on: templates x classes."""
    return [(prompt_for(label, t), label) for t in TEMPLATES for label in range(NUM_CLASSES)]


def balanced_prompts(count: int) -> tuple[list[str], np.ndarray]:
    """`count` evaluation prompts with the ten classes in turn, and their labels, shape (count,)."""
    labels = np.arange(count) % NUM_CLASSES
    return [prompt_for(int(label)) for label in labels], labels
