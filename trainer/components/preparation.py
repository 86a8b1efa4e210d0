"""What a stage needs made once before training: teacher pairs, statistics."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.trainer.context import Setting


class Preparation(ABC):
    """Interface: something made from the base and the prompts before the first step.

    It is made again, the same, when a run continues; a run's budget is charged for it once.
    """

    @abstractmethod
    def prepare(self, setting: "Setting") -> None:
        """Make it; afterwards terms can read it."""
