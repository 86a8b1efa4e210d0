"""Named, complete configurations with what they were measured to reach.

`python -m fewstep.trainer NAME` runs one; every field can be overridden on the command line.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fewstep.trainer.config import (
    DmdConfig,
    EvaluationConfig,
    GridConfig,
    LoraConfig,
    TrainConfig,
    WarmStartConfig,
)


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A configuration people can call by name.

    Attributes:
        summary: One line for `--list`.
        paper: Where the method comes from.
        needs: Data, prompts or reward the run needs.
        result: What it reached, measured where.
        config: The configuration.
    """

    summary: str
    paper: str
    needs: str
    result: str
    config: TrainConfig


SFD_DMD2 = "SFD 2409.19681, then DMD2 2405.14867"
NOT_RUN = "not run at full size (needs a GPU)"

# The student sees four timesteps only, so what depends on time may change too.
TIMED_TARGETS = (
    *LoraConfig().targets,
    r"norm1(_context)?\.linear$",
    r"timestep_embedder",
    r"^proj_out$",
)
UNET_TARGETS = (*LoraConfig().targets, r"time_emb_proj$", r"resnets\.\d+\.conv[12]$")
DIGITS = TrainConfig(
    max_sequence_length=1,
    grid=GridConfig(shift=3.0),
    lora=LoraConfig(targets=TIMED_TARGETS),
    warm_start=WarmStartConfig(num_steps=500, learning_rate=2e-3, teacher_substeps=12),
    dmd=DmdConfig(num_steps=200, learning_rate=5e-5, exit="last", tau_shift=3.0),
)
DIGITS_QUICK = dataclasses.replace(
    DIGITS,
    warm_start=dataclasses.replace(DIGITS.warm_start, num_steps=100),
    dmd=dataclasses.replace(DIGITS.dmd, num_steps=40),
    evaluation=EvaluationConfig(every=100, num_images=500),
)


def digits_sd15(config: TrainConfig) -> TrainConfig:
    """The same run on the epsilon teacher: its own scale, its UNet's layers, no flow shift."""
    return dataclasses.replace(
        config,
        model="digits-sd15",
        max_sequence_length=0,
        guidance_scale=2.0,
        grid=GridConfig(),
        lora=LoraConfig(targets=UNET_TARGETS),
    )


IMAGE = TrainConfig(
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    out=Path("runs/image-4step"),
    guidance_scale=4.5,
    precision="bf16",
    gradient_checkpointing=True,
    ema_decay=0.995,
    grid=GridConfig(shift=3.0),
    lora=LoraConfig(rank=64, alpha=64.0, critic_rank=64),
    warm_start=WarmStartConfig(num_steps=500, learning_rate=1e-4, teacher_substeps=6),
    dmd=DmdConfig(
        num_steps=3000,
        learning_rate=5e-5,
        critic_learning_rate=5e-5,
        critic_updates=5,
        critic_warmup=200,
        ida=0.99,
    ),
    evaluation=EvaluationConfig(every=0),
)

RECIPES: dict[str, NamedRecipe] = {
    "digits-4step": NamedRecipe(
        summary="the shipped digits flow teacher in 4 steps",
        paper=SFD_DMD2,
        needs="nothing (prompts are shipped)",
        result="docs/digits.md",
        config=DIGITS,
    ),
    "digits-4step-quick": NamedRecipe(
        summary="the same, shorter and rougher",
        paper=SFD_DMD2,
        needs="nothing (prompts are shipped)",
        result="docs/digits.md",
        config=DIGITS_QUICK,
    ),
    "digits-sd15-4step": NamedRecipe(
        summary="the shipped digits epsilon teacher (UNet) in 4 steps",
        paper=SFD_DMD2,
        needs="nothing (prompts are shipped)",
        result="docs/digits.md",
        config=digits_sd15(DIGITS),
    ),
    "digits-sd15-4step-quick": NamedRecipe(
        summary="the same, shorter and rougher",
        paper=SFD_DMD2,
        needs="nothing (prompts are shipped)",
        result="docs/digits.md",
        config=digits_sd15(DIGITS_QUICK),
    ),
    "image-4step": NamedRecipe(
        summary="any StableDiffusion or StableDiffusion3 pipeline in 4 steps",
        paper=SFD_DMD2,
        needs="--model and --prompts",
        result=NOT_RUN,
        config=IMAGE,
    ),
}
