"""Starting points for full-size models, each with where its numbers come from.

Rates, ranks and critic settings are those that published LoRA trainers use for the two classes of
models (VP UNets; flow transformers); grids are final, already shifted. None of them was run at full
size by us: they are what a first run should start from.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fewstep.trainer.config import (
    DataConfig,
    EvaluationConfig,
    GridConfig,
    LoraConfig,
    TrainConfig,
)
from fewstep.trainer.methods.sfd import TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2

NOT_RUN = "not run at full size (needs a GPU)"
NEEDS = "--data.prompts"


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


def _method(rate: float, critic_rate: float, updates: int, ida: float) -> WarmDmd2:
    return WarmDmd2(
        warm_start=TrajectoryConfig(num_steps=500, learning_rate=1e-4, teacher_substeps=6),
        match=MatchConfig(
            num_steps=3000,
            learning_rate=rate,
            critic_learning_rate=critic_rate,
            critic_updates=updates,
            critic_warmup=200,
            normaliser_floor=0.1,
            ida=ida,
            beta1=0.9,
        ),
    )


# DMD2's SDXL LoRA script: rates 5e-5, ratio 5, rank 64, alpha 8, w 8, clip 10, uniform tau.
VP = TrainConfig(
    out=Path("runs/sdxl-4step"),
    method=_method(5e-5, 5e-5, 5, 0.99),
    batch_size=16,
    precision="bf16",
    gradient_checkpointing=True,
    ema_decay=0.995,
    grad_clip=10.0,
    lora=LoraConfig(rank=64, alpha=8.0, critic_rank=64),
    evaluation=EvaluationConfig(every=0),
    sample_every=250,
)
# LightX2V and CDM on flow transformers: student 1e-4, critic 2e-5 (rank 64, alpha = rank), clip 1.
FLOW = dataclasses.replace(
    VP,
    method=_method(1e-4, 2e-5, 5, 0.97),
    grad_clip=1.0,
    lora=LoraConfig(rank=64, alpha=64.0, critic_rank=64),
    grid=GridConfig(timesteps=(1000.0, 900.0, 750.0, 500.0), shift=3.0),
)


def _preset(
    name: str,
    summary: str,
    source: str,
    base: TrainConfig,
    model: str,
    scale: float,
    **more: object,
) -> Preset:
    config = dataclasses.replace(
        base,
        model=model,
        out=Path(f"runs/{name}"),
        guidance_scale=scale,
        data=DataConfig(cache="runs/cache"),
        **more,
    )
    return Preset(name, summary, source, NEEDS, NOT_RUN, config)


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="image-4step",
        summary="any supported pipeline in 4 steps",
        source="SFD 2409.19681, then DMD2 2405.14867",
        needs="--model and --data.prompts",
        result=NOT_RUN,
        config=dataclasses.replace(
            FLOW,
            model="stable-diffusion-v1-5/stable-diffusion-v1-5",
            out=Path("runs/image-4step"),
            guidance_scale=4.5,
            grid=GridConfig(shift=3.0),
        ),
    ),
    _preset(
        "sd15-4step",
        "Stable Diffusion 1.5 in 4 steps",
        "DMD2 SD1.5 (w 1.75, ratio 10), rates of its SDXL LoRA script",
        dataclasses.replace(VP, method=_method(5e-5, 5e-5, 10, 0.99)),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        1.75,
    ),
    _preset(
        "sdxl-4step",
        "SDXL in 4 steps",
        "DMD2 SDXL LoRA script: w 8, rungs 999 749 499 249",
        VP,
        "stabilityai/stable-diffusion-xl-base-1.0",
        8.0,
    ),
    _preset(
        "sd35-4step",
        "Stable Diffusion 3.5 medium in 4 steps",
        "DP-DMD w 3.5; LightX2V rates; shift 3",
        FLOW,
        "stabilityai/stable-diffusion-3.5-medium",
        3.5,
    ),
    _preset(
        "flux-4step",
        "FLUX.1-dev in 4 steps",
        "FastGen FLUX: no CFG, embedded guidance 3.5; SwD shift 3",
        FLOW,
        "black-forest-labs/FLUX.1-dev",
        1.0,
        max_sequence_length=512,
    ),
    _preset(
        "pixart-4step",
        "PixArt-Sigma in 4 steps",
        "TDM w 4.5; DMD2 rungs",
        VP,
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        4.5,
    ),
    _preset(
        "sana-4step",
        "Sana in 4 steps",
        "stock w 4.5, flow shift 3 (not confirmed by a published LoRA run)",
        FLOW,
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        4.5,
    ),
    _preset(
        "qwen-4step",
        "Qwen-Image in 4 steps",
        "FastGen and LightX2V Qwen w 4 with the pipeline's norm rescale; Lightning shift 3",
        FLOW,
        "Qwen/Qwen-Image",
        4.0,
    ),
    _preset(
        "z-image-4step",
        "Z-Image in 4 steps",
        "shift 3 as Z-Image-Turbo (8 steps); w 5 (not confirmed by a published LoRA run)",
        FLOW,
        "Tongyi-MAI/Z-Image",
        5.0,
    ),
    _preset(
        "wan-4step",
        "Wan 2.1 1.3B in 4 steps; Wan 2.2's two networks too",
        "LightX2V and FastGen Wan: w 5, shift 5",
        dataclasses.replace(
            FLOW,
            method=_method(2e-5, 1e-5, 5, 0.97),
            grid=GridConfig(timesteps=(1000.0, 937.5, 2500.0 / 3.0, 625.0), shift=5.0),
        ),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        5.0,
        batch_size=8,
    ),
)
