"""Parts that several tiny pipelines share."""

from typing import Any

import diffusers

stock: Any = diffusers
"""Untyped: diffusers annotates tuples of any length as `tuple[int]`, and None nowhere."""


def kl(channels: int, **changes: Any) -> Any:
    return stock.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        **changes,
    )


def flow_scheduler() -> Any:
    return stock.FlowMatchEulerDiscreteScheduler(shift=3.0)


def ddim() -> Any:
    return stock.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
