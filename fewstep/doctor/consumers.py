"""What other hosts need to be told to sample a recipe: ComfyUI's nodes, the torch-free levels."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ComfySettings:
    """One model in ComfyUI's stock nodes.

    Attributes:
        sampler_name: For KSamplerSelect; None where core ComfyUI has no such sampler.
        scheduler: A scheduler of BasicScheduler that gives these very sigmas; None if none does.
        cfg: For the guider.
        sigmas: What the sampler gets, in ComfyUI's convention (sigma / alpha for epsilon and v
            models, sigma for flow models), the last is the end.
        nodes: Node and settings, one line each, in the order they are connected.
        notes: What ComfyUI cannot do, or does differently.
    """

    sampler_name: str | None
    scheduler: str | None
    cfg: float
    sigmas: tuple[float, ...]
    nodes: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuntimeLevel:
    """One level as a host without torch takes it: told timestep, x = alpha * x0 + sigma * noise."""

    timestep: float
    alpha: float
    sigma: float
