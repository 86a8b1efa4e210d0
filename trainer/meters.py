"""Health of a run: does the student's latent distribution drift from the teacher's?"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Mean and deviation of each latent channel.

    Attributes:
        mean: Shape (C,), float32.
        std: Shape (C,), float32.
    """

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(latents: Tensor) -> "ChannelStatistics":
        """Statistics of latents, shape (B, C, h, w)."""
        flat = latents.detach().float().transpose(0, 1).flatten(1)
        return ChannelStatistics(flat.mean(dim=1), flat.std(dim=1))


def channel_drift(student: ChannelStatistics, teacher: ChannelStatistics) -> dict[str, float]:
    """The worst channel's drift: over-saturation and collapse show here before they are seen.

    Returns:
        `health/mean_drift`: largest |mean difference| in teacher deviations;
        `health/std_drift`: largest |log(std ratio)|; both 0 when nothing drifts.
    """
    mean = ((student.mean - teacher.mean).abs() / teacher.std.clamp(min=1e-6)).max()
    ratio = (student.std.clamp(min=1e-6) / teacher.std.clamp(min=1e-6)).log().abs().max()
    return {"health/mean_drift": float(mean), "health/std_drift": float(ratio)}


def peak_memory(device: torch.device) -> dict[str, float]:
    """`memory/peak_gib` of the device (CUDA) or the process so far; nothing where unknown."""
    if device.type == "cuda":
        return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    try:
        import resource
    except ImportError:  # Windows has no getrusage
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory/peak_gib": peak / (2**30 if sys.platform == "darwin" else 2**20)}
