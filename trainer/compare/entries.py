"""What is compared: every named method at its usual step count, and which get more seeds."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fewstep.trainer.config import EvaluationConfig, TrainConfig
from fewstep.trainer.methods.methods import METHODS
from fewstep.trainer.recipes import RECIPES, on_digits

STEPS = (1, 2, 4, 8)
"""Step counts every student is judged at, whatever it was made for."""
MAIN = (
    "sfd",
    "dmd2",
    "dmd2-gan",
    "decoupled-dmd",
    "phased-dmd",
    "tdm",
    "dp-dmd",
    "cdm",
    "senseflow",
    "lcm",
)
"""The ten that are run with every seed."""
DEFAULTS = ("digits-4step", "digits-1step")
"""Our own recommendations, run with every seed beside the ten."""
MODELS = ("digits-sd3", "digits-sd15")
BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the comparison.

    Attributes:
        name: Of the method or recommendation.
        model: The teacher.
        seed: Of the training.
    """

    name: str
    model: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Where its figures lie."""
        return root / self.model / self.name / f"seed-{self.seed}"

    def config(self, root: Path, budget: int) -> TrainConfig:
        """Its settings: the named recipe under the common budget and batch size."""
        return dataclasses.replace(
            named_config(self.name, self.model),
            out=self.folder(root) / "run",
            seed=self.seed,
            budget=budget,
            batch_size=BATCH_SIZE,
            checkpoint_every=1_000_000,  # only at the end
            sample_every=0,
            evaluation=EvaluationConfig(every=0),
            device="cpu",
        )


def named_config(name: str, model: str) -> TrainConfig:
    """The recipe of a method, or of a recommendation, on a teacher."""
    if name in METHODS:
        return on_digits(METHODS[name](), model=model)
    own = name if model == "digits-sd3" else name.replace("digits-", f"{model}-")
    return RECIPES[own].config


def entries(models: tuple[str, ...], names: tuple[str, ...], num_seeds: int) -> list[Entry]:
    """All runs, the main ones with every seed, seed 0 of everything first."""
    found = []
    for seed in range(num_seeds):
        for model in models:
            for name in names:
                if seed == 0 or name in MAIN or name in DEFAULTS:
                    found.append(Entry(name, model, seed))
    return found
