"""Other tasks on the tiny families: image to image, inpainting, ControlNet, IP-Adapter.

One trace of the denoiser's calls is enough to check any of them against the formula of a step, so
the reference in the tests is written once.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.noise_schedule import Level
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe
from fewstep.sampling import to_x0
from tests.tiny.families import SD3
from tests.tiny.family import TinyFamily
from tests.tiny.parts import stock
from tests.tiny.stable_diffusion import build_sd3

EVEN_GRID = (1000.0, 750.0, 500.0, 250.0)
FLAGS = ("requires_safety_checker", "requires_aesthetics_score", "force_zeros_for_empty_prompt")


SD3_WIDE = TinyFamily(
    "sd3 wide", "sd3", lambda: build_sd3(channels=16), SD3.arguments, (16, 16, 16)
)
"""With the 16 latent channels that SD3's inpainting pipeline insists on."""
SD3_DEEP = TinyFamily("sd3 deep", "sd3", lambda: build_sd3(layers=2), SD3.arguments, (4, 16, 16))
"""SD3's last block takes nothing from a ControlNet, so there must be two."""


def recipe_for(family: TinyFamily, **changes: Any) -> FewStepRecipe:
    """Four steps, for flow evenly spread so that strengths are far apart."""
    return family.recipe(**({} if family.is_vp else {"timesteps": EVEN_GRID}), **changes)


def task_pipeline(
    family: TinyFamily, task: type[DiffusionPipeline], **more: nn.Module
) -> DiffusionPipeline:
    """A stock pipeline of another task around a family's components."""
    components = {**family.build().components, **more}
    wanted = inspect.signature(task.__init__).parameters
    missing = {name: None for name in wanted if name not in components and name != "self"}
    flags = {name: wanted[name].default for name in missing if name in FLAGS}
    taken = {name: part for name, part in components.items() if name in wanted}
    pipe = task(**{**taken, **missing, **flags})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made_for(
    family: TinyFamily, task: type[DiffusionPipeline], *, recipe: Any = None, **changes: Any
) -> FewStepPipeline:
    """That pipeline, wrapped."""
    return FewStepPipeline.wrap(
        task_pipeline(family, task), recipe=recipe or recipe_for(family, **changes)
    )


def picture(seed: int = 1) -> Tensor:
    """A random image, 0 to 1, (1, 3, 32, 32)."""
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def half_mask() -> Tensor:
    """1 in the right half, which is painted anew."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1.0
    return mask


def arguments_of(pipe: DiffusionPipeline, family: TinyFamily, **more: Any) -> dict[str, Any]:
    """The family's arguments and a picture, as far as the pipeline's call takes them."""
    arguments = {**family.arguments(1), "image": picture(), **more}
    taken = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in arguments.items() if name in taken}


@dataclass(frozen=True)
class Call:
    """What the denoiser was given and what it said."""

    sample: Tensor
    timestep: float
    output: Tensor


def trace(model: nn.Module) -> list[Call]:
    """From now on, every call of a denoiser, in order."""
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        sample = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        calls.append(Call(sample, float(torch.as_tensor(timestep).reshape(-1)[0]), out[0]))

    model.register_forward_hook(hook, with_kwargs=True)
    return calls


def euler(recipe: FewStepRecipe, call: Call, now: Level, following: Level) -> Tensor:
    """Where a deterministic step leads, written out: `alpha' x0 + sigma' epsilon`."""
    x0 = to_x0(recipe.base.prediction, call.output, call.sample, now)
    epsilon = (call.sample - now.alpha * x0) / now.sigma
    return following.alpha * x0 + following.sigma * epsilon


def build_controlnet(family: TinyFamily, *, extra_channels: int = 0) -> nn.Module:
    """A ControlNet of a family with random weights everywhere (a new one says nothing)."""
    denoiser: Any = family.build().components[family.denoisers[0]]
    if family.is_vp:
        net = stock.ControlNetModel.from_unet(
            denoiser,
            conditioning_embedding_out_channels=(8, 16),  # halves the picture once, as this VAE
            load_weights_from_unet=False,
        )
    elif family.family == "sd3":
        net = stock.SD3ControlNetModel.from_transformer(
            denoiser,
            num_layers=1,
            num_extra_conditioning_channels=extra_channels,
            load_weights_from_transformer=False,
        )
    else:
        net = stock.FluxControlNetModel.from_transformer(
            denoiser,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            load_weights_from_transformer=False,
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return net


def add_ip_adapter(family: TinyFamily, pipe: Any) -> Tensor:
    """Random IP-Adapter weights on a pipeline's denoiser; returns embeddings for a call."""
    model = pipe.components[family.denoisers[0]]
    embeds = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(6))
    if family.is_vp:
        model._load_ip_adapter_weights([_unet_adapter(model)], low_cpu_mem_usage=False)
    elif family.family == "flux":
        model._load_ip_adapter_weights([_flux_adapter(model)], low_cpu_mem_usage=False)
    else:
        _set_sd3_adapter(model)
        embeds = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(6))
    return embeds


def _normal(*shape: int) -> Tensor:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _projection(width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": _normal(4 * width, 8),
        "proj.bias": _normal(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _unet_adapter(unet: Any) -> dict[str, Any]:
    width = unet.config.cross_attention_dim
    names = [name for name in unet.attn_processors if "attn2" in name]
    modules = dict(unet.named_modules())
    weights = {}
    for index, name in enumerate(names):
        attention = modules[name.removesuffix(".processor")]
        for kind in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * index + 1}.{kind}.weight"] = _normal(attention.inner_dim, width)
    return {"image_proj": _projection(width), "ip_adapter": weights}


def _flux_adapter(transformer: Any) -> dict[str, Any]:
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    weights = {}
    for kind in ("to_k_ip", "to_v_ip"):
        weights |= {f"0.{kind}.weight": _normal(inner, width), f"0.{kind}.bias": _normal(inner)}
    return {"image_proj": _projection(width), "ip_adapter": weights}


def _set_sd3_adapter(transformer: Any) -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    torch.manual_seed(7)
    width = transformer.config.attention_head_dim * transformer.config.num_attention_heads
    transformer.set_attn_processor(
        {
            name: SD3IPAdapterJointAttnProcessor2_0(width, width, 8, timesteps_emb_dim=16)
            for name in transformer.attn_processors
        }
    )
    transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=8,
        output_dim=width,
        hidden_dim=16,
        depth=1,
        dim_head=8,
        heads=2,
        num_queries=4,
        timestep_in_dim=16,
        timestep_flip_sin_to_cos=True,
        timestep_freq_shift=0,
    )
