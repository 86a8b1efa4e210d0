"""How a family puts its conditional and unconditional answers together, in x0."""

from collections.abc import Callable

from torch import Tensor

from fewstep.trainer.backbones.latents import pack, unpack

Combination = Callable[[Tensor, Tensor, float | Tensor, Tensor], Tensor]
"""(cond x0, uncond x0, scale, sample) -> guided x0."""


def plain_guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor, sample: Tensor) -> Tensor:
    """`uncond + scale * (cond - uncond)`; linear, so the same in x0 as in any prediction.

    Args:
        cond: x0 under the prompt, shape (B, ...).
        uncond: x0 under the null condition, same shape.
        scale: w, one number or shape (B, 1, ...).
        sample: What both were predicted from; not looked at here.
    """
    return uncond + scale * (cond - uncond)


def norm_kept_guidance(
    cond: Tensor, uncond: Tensor, scale: float | Tensor, sample: Tensor
) -> Tensor:
    """Plain guidance whose velocity keeps the length of the conditional one, token by token.

        d = sample - x0 = sigma * velocity;   d_guided <- d_guided * |d_cond| / |d_guided|

    The lengths are over a 2x2 patch of all channels; sigma cancels in their ratio.

    Args:
        cond: x0 under the prompt, shape (B, C, h, w).
        uncond: x0 under the null condition, same shape.
        scale: w, one number or shape (B, 1, 1, 1).
        sample: What both were predicted from, same shape.

    Source:
        diffusers QwenImagePipeline (`comb_pred * (cond_norm / noise_norm)`).
    """
    *_, height, width = sample.shape
    wanted = pack(sample - cond)
    guided = pack(sample - plain_guidance(cond, uncond, scale, sample))
    kept = guided * (wanted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return sample - unpack(kept, height, width)
