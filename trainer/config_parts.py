"""The parts of a config that every method shares."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fewstep.errors import ConfigError
from fewstep.trainer.config_checks import above, at_least, within


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is trained: adapters on the shared base, or a network of the student's own."""

    student: Literal["lora", "lorad", "two-time", "full", "smaller"] = "lora"
    """lora; lorad (rotations) and two-time (lora and a head that is told where a step ends), both
    saved as their own kind; full: a trained copy; smaller: a copy with fewer blocks. The last two
    are saved as a whole component."""
    critic: Literal["lora", "lorad", "full"] = "lora"
    """An adapter, rotations, or a trained copy of the base."""
    rank: int = 32
    """Rank of the student's adapter. File size and memory grow linearly."""
    alpha: float = 32.0
    """The adapter is multiplied by alpha / rank (baked to alpha = rank in the saved file)."""
    critic_rank: int = 32
    """Rank of the critic's adapter; at least the student's."""
    targets: tuple[str, ...] = ()
    """Regular expressions of the layers that get an adapter; empty takes the family's own."""
    trainable: tuple[str, ...] = ()
    """student full: regular expressions of the parameters that are trained; empty trains all."""
    keep_blocks: int = 1
    """student smaller: blocks that are kept, evenly spaced, the last one among them."""
    imitation_steps: int = 300
    """student smaller: steps of feature distillation from the teacher's blocks before the method's
    own stages (0.3 of a budget); 0 skips them."""

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)
        above("lora.alpha", self.alpha, 0.0)
        at_least("lora.critic-rank", self.critic_rank, self.rank)
        at_least("lora.keep-blocks", self.keep_blocks, 1)
        at_least("lora.imitation-steps", self.imitation_steps, 0)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The student's steps; what is trained is what the recipe stores."""

    num_steps: int = 4
    """Steps the student is made for."""
    also_steps: tuple[int, ...] = ()
    """Further step counts the same adapter is trained for, each on its even grid."""
    timesteps: tuple[float, ...] = ()
    """The grid itself, already shifted; empty takes the even one of num_steps."""
    shift: float = 1.0
    """Flow teachers: time shift of the grid (applied once); ignored by epsilon and v teachers."""
    stochasticity: float = 0.0
    """0 Euler/DDIM steps; 1 re-noises between steps as DMD2; between is TCD's gamma."""
    sizes: tuple[float, ...] = ()
    """Height and width of each step's sample as a share of the finished one, rising to 1 (swd; the
    steps must re-noise); empty: all are full-size."""

    def __post_init__(self) -> None:
        at_least("grid.num-steps", self.num_steps, 1)
        for count in self.also_steps:
            at_least("grid.also-steps", count, 1)
        above("grid.shift", self.shift, 0.0)
        within("grid.stochasticity", self.stochasticity, 0.0, 1.0)
        if self.sizes:
            self._check_sizes()

    def _check_sizes(self) -> None:
        if len(self.sizes) != self.num_steps:
            raise ConfigError(
                f"grid.sizes has {len(self.sizes)} values and grid.num-steps is {self.num_steps}; "
                "make them equal"
            )
        rises = all(a <= b for a, b in pairwise(self.sizes))
        if not rises or self.sizes[0] <= 0.0 or self.sizes[-1] != 1.0:
            raise ConfigError(
                f"grid.sizes are {list(self.sizes)}; wanted shares above 0 that rise to 1"
            )
        if self.sizes[0] != 1.0 and self.stochasticity != 1.0:
            raise ConfigError(
                f"grid.sizes grow but grid.stochasticity is {self.stochasticity:g}; a sample can "
                "only grow where it is noised afresh, so set it to 1"
            )

    @property
    def all_steps(self) -> tuple[int, ...]:
        """Every step count the student is made for, fewest first."""
        return tuple(sorted({self.num_steps, *self.also_steps}))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the student is trained on: prompts always, pictures only where a method asks."""

    prompts: str = ""
    """Prompt file (.txt, .jsonl, .csv, .tsv, .parquet) or datasets:NAME[:split[:column]]; digits
    teachers bring their own."""
    column: str = ""
    """Name of the prompt column where it is not prompt, text or caption."""
    images: str = ""
    """Pictures or latents for data terms: a folder, .safetensors latents or webdataset .tar shards;
    digits teachers bring the real digits."""
    cache: str = ""
    """Folder for cached embeddings and latents, with checksums; empty caches nothing."""
    area_px: int = 0
    """Aspect buckets: pixels of a picture; 0 takes the square of the model's own size."""
    skip_bad: bool = False
    """Count and leave out bad rows and pictures instead of stopping at the first."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores during the run; the best checkpoint is the one that is exported."""

    every: int = 100
    """Optimizer steps between evaluations; 0 never."""
    num_images: int = 1000
    """Pictures per evaluation (digits teachers only)."""

    def __post_init__(self) -> None:
        at_least("evaluation.every", self.every, 0)
        at_least("evaluation.num-images", self.num_images, 100)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done when a run goes wrong; warnings are always logged."""

    nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not a number: stop with the last good state, or skip the update
    (ten in a row stop)."""
    drift: float = 0.5
    """Latent drift from the teacher (mean in deviations, or log of the deviation's ratio) above
    which the run is warned about; 0 does not look."""
    on_drift: Literal["warn", "stop", "slow"] = "warn"
    """slow halves the student's learning rate for the rest of the stage."""
    critic_lag: float = 0.0
    """health/dm_cos below which the critic is given extra steps; 0 does not look."""
    extra_critic_updates: int = 2
    """Critic steps added while it lags."""

    def __post_init__(self) -> None:
        at_least("guard.drift", self.drift, 0.0)
        within("guard.critic-lag", self.critic_lag, 0.0, 1.0)
        at_least("guard.extra-critic-updates", self.extra_critic_updates, 0)
