"""Everything a run needs to know, as frozen dataclasses; the attribute texts are the `--help`."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fewstep import strict_json
from fewstep.errors import ConfigError

DIGITS_PREFIX = "digits-"


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Student, critic and average adapters."""

    rank: int = 32
    """Rank of the student's adapter. File size and memory grow linearly."""
    alpha: float = 32.0
    """The adapter is multiplied by alpha / rank (baked to alpha = rank in the saved file)."""
    critic_rank: int = 32
    """Rank of the critic's adapter; at least the student's."""
    targets: tuple[str, ...] = (
        r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        r"\.(ff|ff_context)\.net\.",
    )
    """Regular expressions of the layers that get an adapter."""

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        _above("lora.alpha", self.alpha, 0.0)
        _at_least("lora.critic-rank", self.critic_rank, self.rank)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The student's steps; what is trained is what the recipe stores."""

    num_steps: int = 4
    """Steps the student is made for."""
    shift: float = 1.0
    """Flow teachers: time shift of the grid (applied once); ignored by epsilon and v teachers."""
    stochasticity: float = 0.0
    """0 Euler/DDIM steps; 1 re-noises between steps as DMD2; between is TCD's gamma."""

    def __post_init__(self) -> None:
        _at_least("grid.num-steps", self.num_steps, 1)
        _above("grid.shift", self.shift, 0.0)
        _within("grid.stochasticity", self.stochasticity, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Stage 1: the student's steps follow the teacher's trajectory (SFD)."""

    num_steps: int = 300
    """Optimizer steps; 0 skips the stage."""
    learning_rate: float = 1e-3
    """Peak, after a short warm-up; falls to a tenth along a cosine."""
    teacher_substeps: int = 4
    """Teacher steps inside one student step."""

    def __post_init__(self) -> None:
        _at_least("warm-start.num-steps", self.num_steps, 0)
        _above("warm-start.learning-rate", self.learning_rate, 0.0)
        _at_least("warm-start.teacher-substeps", self.teacher_substeps, 1)


@dataclass(frozen=True, kw_only=True)
class DmdConfig:
    """Stage 2: distribution matching with backward simulation (DMD2)."""

    num_steps: int = 400
    """Optimizer steps of the student; 0 skips the stage."""
    learning_rate: float = 1e-4
    """Student."""
    critic_learning_rate: float = 4e-4
    """Critic."""
    critic_updates: int = 2
    """Critic steps per student step (TTUR)."""
    critic_warmup: int = 50
    """Critic steps before the first student step."""
    exit: Literal["random", "last"] = "random"
    """Step of the rollout that is compared: any (DMD2), or the last, the picture itself."""
    tau_min: float = 0.02
    """Lowest noise at which teacher and critic are compared, share of the schedule."""
    tau_max: float = 0.98
    """Highest."""
    tau_shift: float = 1.0
    """Above 1 moves the comparisons toward noise, by the flow time shift formula."""
    normaliser_floor: float = 0.05
    """Lower bound of mean|x0 - teacher_x0|, the DMD gradient's denominator."""
    ida: float = 1.0
    """SenseFlow's IDA: critic = ida * critic + (1 - ida) * student after each step; 1 is off."""
    beta1: float = 0.0
    """AdamW's first beta in this stage (DMD family: 0)."""

    def __post_init__(self) -> None:
        _at_least("dmd.num-steps", self.num_steps, 0)
        _above("dmd.learning-rate", self.learning_rate, 0.0)
        _above("dmd.critic-learning-rate", self.critic_learning_rate, 0.0)
        _at_least("dmd.critic-updates", self.critic_updates, 1)
        _at_least("dmd.critic-warmup", self.critic_warmup, 0)
        _within("dmd.tau-min", self.tau_min, 0.0, 1.0)
        _within("dmd.tau-max", self.tau_max, self.tau_min, 1.0)
        _above("dmd.tau-shift", self.tau_shift, 0.0)
        _at_least("dmd.normaliser-floor", self.normaliser_floor, 0.0)
        _within("dmd.ida", self.ida, 0.0, 1.0)
        _within("dmd.beta1", self.beta1, 0.0, 0.999)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scores during the run; the best checkpoint is the one that is exported."""

    every: int = 100
    """Optimizer steps between evaluations; 0 never."""
    num_images: int = 1000
    """Pictures per evaluation (digits teachers only)."""

    def __post_init__(self) -> None:
        _at_least("evaluation.every", self.every, 0)
        _at_least("evaluation.num-images", self.num_images, 100)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run."""

    model: str = "digits-sd3"
    """Teacher: digits-sd3, digits-sd15, a diffusers folder or a hub id."""
    out: Path = Path("runs/digits-4step")
    """Run folder. An unfinished run in it is continued."""
    prompts: str = ""
    """Text file, one prompt per line; digits teachers bring their own."""
    guidance_scale: float = 1.2
    """Teacher's scale w in uncond + w * (cond - uncond), distilled into the student; 1 is off."""
    batch_size: int = 64
    """Samples per optimizer step."""
    accumulation: int = 1
    """Parts a batch is cut into to save memory; the result is the same."""
    max_sequence_length: int = 0
    """Text tokens, for pipelines that take it (SD3, FLUX); 0 takes the pipeline's default."""
    size_px: int = 0
    """Square image size; 0 takes the model's own."""
    seed: int = 0
    """Everything random in the run."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the base; adapters and losses are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute blocks in backward: less memory, more time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    ema_decay: float = 0.99
    """Of the averaged adapter, the one that is evaluated and exported."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    checkpoint_every: int = 50
    """Optimizer steps between checkpoints: the most a crash can cost."""
    sample_every: int = 100
    """Optimizer steps between sample grids; 0 never."""
    grid: GridConfig = field(default_factory=GridConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    dmd: DmdConfig = field(default_factory=DmdConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        _at_least("batch-size", self.batch_size, 1)
        _at_least("accumulation", self.accumulation, 1)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch-size {self.batch_size} cannot be cut into {self.accumulation} equal parts; "
                "choose an accumulation that divides it"
            )
        _at_least("guidance-scale", self.guidance_scale, 0.0)
        _within("ema-decay", self.ema_decay, 0.0, 1.0)
        _above("grad-clip", self.grad_clip, 0.0)
        _at_least("checkpoint-every", self.checkpoint_every, 1)
        _at_least("sample-every", self.sample_every, 0)
        if self.dmd.ida < 1.0 and self.lora.critic_rank != self.lora.rank:
            raise ConfigError(
                f"dmd.ida mixes student and critic adapters, but lora.critic-rank is "
                f"{self.lora.critic_rank} and lora.rank {self.lora.rank}; make them equal"
            )
        if self.num_steps == 0:
            raise ConfigError("both stages have 0 steps; set warm-start.num-steps or dmd.num-steps")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the student, both stages."""
        return self.warm_start.num_steps + self.dmd.num_steps

    @property
    def is_digits(self) -> bool:
        """Whether the teacher is one of the shipped ones."""
        return self.model.startswith(DIGITS_PREFIX)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives back an equal config."""
        return {**dataclasses.asdict(self), "out": self.out.as_posix()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "TrainConfig":
        """Read config.json back, strictly."""
        return strict_json.read(TrainConfig, data, error=ConfigError)

    def digest(self) -> str:
        """`sha256:` of everything that shapes the weights (not of where they are written)."""
        shaping = {k: v for k, v in self.to_dict().items() if k not in ("out", "device")}
        text = json.dumps(shaping, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{name} must be >= {least:g}, got {value:g}")


def _above(name: str, value: float, bound: float) -> None:
    if value <= bound:
        raise ConfigError(f"{name} must be above {bound:g}, got {value:g}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be {low:g} to {high:g}, got {value:g}")
