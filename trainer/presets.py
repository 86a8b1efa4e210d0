"""Starting points for full-size models, each with where its numbers come from."""

from dataclasses import dataclass
from pathlib import Path

from fewstep.trainer.config import EvaluationConfig, GridConfig, LoraConfig, TrainConfig
from fewstep.trainer.methods.sfd import TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2

NOT_RUN = "not run at full size (needs a GPU)"


@dataclass(frozen=True, slots=True)
class Preset:
    """A configuration for one family of models.

    Attributes:
        name: On the command line.
        summary: One line.
        source: Where the numbers come from.
        needs: What the user must bring.
        result: What it reached.
        config: The configuration.
    """

    name: str
    summary: str
    source: str
    needs: str
    result: str
    config: TrainConfig


IMAGE = TrainConfig(
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    out=Path("runs/image-4step"),
    method=WarmDmd2(
        warm_start=TrajectoryConfig(num_steps=500, learning_rate=1e-4, teacher_substeps=6),
        match=MatchConfig(
            num_steps=3000,
            learning_rate=5e-5,
            critic_learning_rate=5e-5,
            critic_updates=5,
            critic_warmup=200,
            ida=0.99,
        ),
    ),
    guidance_scale=4.5,
    precision="bf16",
    gradient_checkpointing=True,
    ema_decay=0.995,
    grid=GridConfig(shift=3.0),
    lora=LoraConfig(rank=64, alpha=64.0, critic_rank=64),
    evaluation=EvaluationConfig(every=0),
)

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="image-4step",
        summary="any supported pipeline in 4 steps",
        source="SFD 2409.19681, then DMD2 2405.14867",
        needs="--model and --data.prompts",
        result=NOT_RUN,
        config=IMAGE,
    ),
)
