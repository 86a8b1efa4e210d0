"""Scores during a run, on fixed seeds, of the averaged adapter."""

from abc import ABC, abstractmethod

import numpy as np

from fewstep.digits.judge import DigitsJudge

EVALUATION_SEED = 500_000_000
"""First image seed of evaluations; the final report uses others."""


class Evaluator(ABC):
    """Interface: pictures to scores; the first score named by `key` picks the best checkpoint."""

    key: str
    """Name of the score that ranks checkpoints; lower is better."""

    @abstractmethod
    def prompts(self) -> list[int]:
        """Which prompt of the book each picture is drawn for."""

    @abstractmethod
    def score(self, images: np.ndarray) -> dict[str, float]:
        """Scores of those pictures, uint8 (N, H, W, 3), by metric name."""


class DigitsEvaluator(Evaluator):
    """Frechet distance, accuracy, recall and diversity against the real digits.

    Args:
        num_images: Pictures per evaluation, classes in turn.
        labels_of_prompts: The digit each prompt of the book asks for.
    """

    key = "eval/frechet"

    def __init__(self, num_images: int, labels_of_prompts: list[int]) -> None:
        self._judge = DigitsJudge()
        first = [labels_of_prompts.index(digit) for digit in range(10)]
        self._prompts = [first[i % 10] for i in range(num_images)]
        self._labels = np.arange(num_images) % 10

    def prompts(self) -> list[int]:
        return self._prompts

    def score(self, images: np.ndarray) -> dict[str, float]:
        scores = self._judge.score(images, self._labels)
        return {
            "eval/frechet": scores.frechet,
            "eval/accuracy": scores.accuracy,
            "eval/recall": scores.recall,
            "eval/diversity": scores.diversity,
        }
