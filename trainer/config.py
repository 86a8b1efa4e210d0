"""Everything a run needs to know, as frozen dataclasses; the attribute texts are the `--help`."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fewstep import strict_json
from fewstep.errors import ConfigError
from fewstep.trainer.config_checks import above, at_least, check_base, within
from fewstep.trainer.config_parts import (
    DataConfig,
    EvaluationConfig,
    GridConfig,
    GuardConfig,
    LoraConfig,
)
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.methods import METHODS, AnyMethod
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "GridConfig",
    "GuardConfig",
    "LoraConfig",
    "TrainConfig",
]
DIGITS_PREFIX = "digits-"
NOT_SHAPING = ("out", "device", "shard", "checkpoint_every", "sample_every")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run."""

    model: str = "digits-sd3"
    """Teacher: digits-sd3, digits-sd15, a diffusers folder or a hub id."""
    out: Path = Path("runs/digits-4step")
    """Run folder. An unfinished run in it is continued."""
    method: AnyMethod = WarmDmd2()
    """What is trained, how: stages, losses, critic. `--list` shows all methods."""
    guidance_scale: float = 1.2
    """Teacher's scale w in uncond + w * (cond - uncond), distilled into the student; 1 is off."""
    batch_size: int = 64
    """Samples per optimizer step, over all processes."""
    accumulation: int = 1
    """Parts a batch is cut into to save memory; the result is the same."""
    budget: int = 0
    """Network evaluations (samples times calls of teacher, student and critic) the run may spend;
    its stages then share them and their own num_steps do not count. 0: no budget."""
    init: str = ""
    """Adapter file to start student and critic from (any turbo LoRA, or a full delta, cut to the
    rank by SVD); empty starts from the teacher."""
    max_sequence_length: int = 0
    """Text tokens, for pipelines that take it (SD3, FLUX); 0 takes the pipeline's default."""
    size_px: int = 0
    """Square image size; 0 takes the model's own."""
    num_frames: int = 0
    """Video: frames of a clip; 0 takes 81. Nothing to pictures."""
    seed: int = 0
    """Everything random in the run."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the base; adapters and losses are always fp32."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Of the frozen base: int8 by torchao, nf4 by bitsandbytes (CUDA); the teacher then is the
    quantised one."""
    gradient_checkpointing: bool = False
    """Recompute blocks in backward: less memory, more time."""
    shard: bool = False
    """Cut the frozen base over the processes of a machine (FSDP2), for models that no single GPU
    holds; adapters stay whole everywhere."""
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
    data: DataConfig = field(default_factory=DataConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        at_least("batch-size", self.batch_size, 1)
        at_least("accumulation", self.accumulation, 1)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch-size {self.batch_size} cannot be cut into {self.accumulation} equal parts; "
                "choose an accumulation that divides it"
            )
        at_least("budget", self.budget, 0)
        at_least("num-frames", self.num_frames, 0)
        at_least("guidance-scale", self.guidance_scale, 0.0)
        within("ema-decay", self.ema_decay, 0.0, 1.0)
        above("grad-clip", self.grad_clip, 0.0)
        at_least("checkpoint-every", self.checkpoint_every, 1)
        at_least("sample-every", self.sample_every, 0)
        check_base(self)
        self.method.check(self)

    @property
    def is_digits(self) -> bool:
        """Whether the teacher is one of the shipped ones."""
        return self.model.startswith(DIGITS_PREFIX)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives back an equal config."""
        method = {"name": self.method.facts.name, **dataclasses.asdict(self.method)}
        return {**dataclasses.asdict(self), "out": self.out.as_posix(), "method": method}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "TrainConfig":
        """Read config.json back, strictly."""
        rest = dict(data)
        method = method_from_dict(rest.pop("method", None))
        config = strict_json.read(_Rest, rest, error=ConfigError)
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return TrainConfig(method=method, **values)  # pyright: ignore[reportArgumentType]

    def digest(self) -> str:
        """`sha256:` of everything that shapes the weights (not of where they are written)."""
        shaping = {k: v for k, v in self.to_dict().items() if k not in NOT_SHAPING}
        text = json.dumps(shaping, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


_Rest = dataclasses.make_dataclass(
    "TrainConfig",
    [
        (f.name, f.type, dataclasses.field(default_factory=f.default_factory))
        if f.default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING
        else (f.name, f.type, f.default)
        for f in dataclasses.fields(TrainConfig)
        if f.name != "method"
    ],
    kw_only=True,
    frozen=True,
)


def method_from_dict(data: object) -> Method:
    """A method from its JSON object: its name and its settings.

    Raises:
        ConfigError: No such method, or a setting of it is wrong.
    """
    if not isinstance(data, dict) or data.get("name") not in METHODS:
        known = ", ".join(METHODS)
        name = data.get("name") if isinstance(data, dict) else data
        raise ConfigError(f"method {name!r} is unknown; use one of {known}")
    rest = {key: value for key, value in data.items() if key != "name"}
    return strict_json.read(METHODS[data["name"]], rest, error=ConfigError, where="method")
