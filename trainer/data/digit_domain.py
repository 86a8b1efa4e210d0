"""A new domain in a handful of pictures: the shipped digits, written with another pen."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from fewstep.digits.data import Digits, load_digits

Domain = Literal["thick", "inverted"]
PEN_PX = 7
"""Strokes of the thick domain grow by this side of a square, in 64 px pictures."""


def _thick(picture: np.ndarray) -> np.ndarray:
    """The darkest value around each pixel: dark ink spreads on white paper."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.MinFilter(PEN_PX)))


def _inverted(picture: np.ndarray) -> np.ndarray:
    """White ink on black paper."""
    return 255 - picture


PENS: dict[Domain, Callable[[np.ndarray], np.ndarray]] = {"thick": _thick, "inverted": _inverted}


def digits_of_domain(domain: Domain, count: int) -> Digits:
    """`count` real digits in the domain, the ten classes in turn, always the same ones.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    digits = load_digits()
    by_class = [np.flatnonzero(digits.labels == label) for label in range(10)]
    rows = np.array([by_class[i % 10][i // 10] for i in range(count)])
    images = np.stack([PENS[domain](picture) for picture in digits.images[rows]])
    return Digits(images, digits.labels[rows])
