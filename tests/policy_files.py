"""Policy heads for tiny pipelines, and what they mean, written by hand."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional

from fewstep.adapters import save_policy_adapter
from fewstep.recipe import FewStepRecipe, Sampler, StepPolicy
from tests.head_files import add_lora_by_hand, denoiser, lora_tensors
from tests.tiny_pipelines import FLUX, QWEN_IMAGE, SD3, TinyFamily, stock

DX = StepPolicy(kind="dx", components=3, shift=5.0, segment=0.25, substeps=32)
GM = StepPolicy(kind="gm", components=3, shift=5.0, substeps=32, temperature=0.6)
WIDTH = 6
"""Of the hidden layer that tells the log deviation."""


def build_sd3_of_patches() -> DiffusionPipeline:
    """SD3 whose tokens are 2 x 2 pixels."""
    pipe: Any = SD3.build()
    torch.manual_seed(1)
    config = {**pipe.transformer.config, "patch_size": 2}
    pipe.register_modules(transformer=stock.SD3Transformer2DModel.from_config(config))
    return pipe


SD3_PATCHES = replace(SD3, name="sd3-patches", build=build_sd3_of_patches)
HOSTS = (SD3, SD3_PATCHES, FLUX, QWEN_IMAGE)


def policy_recipe(family: TinyFamily, policy: StepPolicy, **changes: Any) -> FewStepRecipe:
    return family.recipe(sampler=Sampler(kind="policy", policy=policy), **changes)


def pixels_of(family: TinyFamily) -> tuple[int, int]:
    """Pixels that the model, and that the pipeline, takes out of one token."""
    if family.family == "sd3":
        return int(denoiser(family.build(), family).config.patch_size) ** 2, 1  # pyright: ignore
    return 1, 4


def head_tensors(
    family: TinyFamily, policy: StepPolicy, seed: int = 3, *, with_norm: bool = False
) -> dict[str, Tensor]:
    """A random head, near the stock layer so that pictures stay of their size."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    head = stock_head(family, policy)
    width = head["means.weight"].shape[1]
    head = {name: values + drawn(*values.shape) for name, values in head.items()}
    if policy.kind == "gm":
        del head["logstd"]
        head |= {"logstds.0.weight": drawn(WIDTH, width), "logstds.0.bias": drawn(WIDTH)}
        head |= {"logstds.1.weight": drawn(1, WIDTH), "logstds.1.bias": drawn(1) - 1.0}
    if with_norm:
        head |= {"norm_out.weight": drawn(2 * width, width), "norm_out.bias": drawn(2 * width)}
    return head


def stock_head(family: TinyFamily, policy: StepPolicy) -> dict[str, Tensor]:
    """A head whose components all are the stock layer's own answer."""
    layer: Any = denoiser(family.build(), family).get_submodule("proj_out")
    of_model, of_pipeline = pixels_of(family)

    def repeated(values: Tensor) -> Tensor:
        parts = values.detach().unflatten(0, (of_model, 1, -1))
        return parts.expand(-1, policy.components, *parts.shape[2:]).flatten(0, 2).clone()

    head = {"means.weight": repeated(layer.weight), "means.bias": repeated(layer.bias)}
    if policy.kind == "gm":
        outputs = of_model * policy.components * of_pipeline
        head["logweights.weight"] = torch.zeros(outputs, layer.in_features)
        head["logweights.bias"] = torch.zeros(outputs)
        head["logstd"] = torch.tensor([-25.0])
    return head


def policy_file(
    family: TinyFamily,
    path: Path,
    policy: StepPolicy,
    *,
    head: dict[str, Tensor] | None = None,
    recipe: FewStepRecipe | None = None,
    **options: Any,
) -> Path:
    """A LoRA with a policy head."""
    return save_policy_adapter(
        path,
        lora_tensors(family, 1),
        head or head_tensors(family, policy),
        recipe=recipe or policy_recipe(family, policy),
        rank=2,
        alpha=2.0,
        title="policy",
        **options,
    )


def authors_names(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same head under the names of pi-Flow's authors."""
    named = {}
    for name, values in head.items():
        part, _, rest = name.partition(".")
        if part == "logstds":
            index, _, kind = rest.partition(".")
            named[f"proj_out_logstds.{2 * int(index) + 1}.{kind}"] = values
        elif part == "norm_out":
            named[f"norm_out.linear.{rest}"] = values
        else:
            named[f"proj_out_{part}.{rest}"] = values
    return named


# --- what a head means, by hand: no code of the product


def drawn_by_hand(
    family: TinyFamily,
    policy: StepPolicy,
    head: dict[str, Tensor],
    recipe: FewStepRecipe,
    seed: int = 0,
) -> Tensor:
    """Latents as a picture (B, C, h, w), sampled with the head and the LoRA."""
    pipe = family.build()
    model: Any = denoiser(pipe, family)
    add_lora_by_hand(model, lora_tensors(family, 1))
    if "norm_out.weight" in head:
        model.norm_out.linear.load_state_dict(
            {"weight": head["norm_out.weight"], "bias": head["norm_out.bias"]}
        )
    seen: dict[str, Tensor] = {}
    model.norm_out.register_forward_hook(lambda _, args, out: seen.update(t=args[1], h=out))
    sample = torch.randn((1, *family.latent_shape), generator=torch.Generator().manual_seed(seed))
    sample = sample.reshape(1, -1, *sample.shape[-2:])
    levels = recipe.levels()
    for now, following in itertools.pairwise(levels):
        with torch.no_grad():
            call_by_hand(family, model, sample, now.timestep)
        parts = parts_by_hand(family, policy, head, seen["h"], seen["t"])
        temperature = 1.0 if following.sigma == 0.0 else policy.temperature
        x0_at = reader_by_hand(policy, parts, sample, now.sigma, temperature)
        sample = follow_by_hand(policy, x0_at, sample, now.sigma, following.sigma)
    return sample


def call_by_hand(family: TinyFamily, model: Any, sample: Tensor, timestep: float) -> None:
    arguments = family.arguments(1)
    told: dict[str, Any] = {"encoder_hidden_states": arguments["prompt_embeds"]}
    if family.family == "sd3":
        told["pooled_projections"] = arguments["pooled_prompt_embeds"]
        model(sample, timestep=torch.tensor([timestep]), **told)
        return
    time = torch.tensor([timestep / 1000.0])
    height, width = (size // 2 for size in sample.shape[-2:])
    if family.family == "flux":
        ids = torch.zeros(height, width, 3)
        ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)[None]
        told |= {"pooled_projections": arguments["pooled_prompt_embeds"]}
        told |= {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(6, 3)}
    else:
        told |= {"img_shapes": [[(1, height, width)]]}
        told |= {"encoder_hidden_states_mask": arguments["prompt_embeds_mask"]}
    model(packed(sample), timestep=time, **told)


def packed(picture: Tensor) -> Tensor:
    """(B, C, h, w) as tokens of 2 x 2 pixels, channels first in each."""
    batch, channels, height, width = picture.shape
    parts = picture.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`."""
    parts = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def parts_by_hand(
    family: TinyFamily, policy: StepPolicy, head: dict[str, Tensor], hidden: Tensor, time: Tensor
) -> dict[str, Tensor]:
    """Means (B, K, C, h, w), log weights (B, K, 1, h, w) and log deviation of pictures."""
    height, width = family.latent_shape[-2:]

    def picture(name: str) -> Tensor:
        flat = functional.linear(hidden, head[f"{name}.weight"], head[f"{name}.bias"])
        if family.family != "sd3":
            return torch.stack(
                [unpacked(part, height, width) for part in flat.chunk(policy.components, -1)], 1
            )
        side = math.isqrt(pixels_of(family)[0])
        parts = flat.reshape(len(flat), height // side, width // side, side, side, -1)
        whole = parts.permute(0, 5, 1, 3, 2, 4).reshape(len(flat), -1, height, width)
        return whole.unflatten(1, (policy.components, -1))

    if policy.kind == "dx":
        return {"means": picture("means")}
    if "logstd" in head:
        deviation = head["logstd"].reshape(1, 1)
    else:
        inner = functional.linear(
            functional.silu(time), head["logstds.0.weight"], head["logstds.0.bias"]
        )
        deviation = functional.linear(
            functional.silu(inner), head["logstds.1.weight"], head["logstds.1.bias"]
        )
    return {
        "means": picture("means"),
        "logits": picture("logweights"),
        "deviation": deviation[:, :, None, None, None],
    }


def reader_by_hand(
    policy: StepPolicy,
    parts: dict[str, Tensor],
    start: Tensor,
    start_sigma: float,
    temperature: float,
) -> Callable[[Tensor, float], Tensor]:
    """Clean data at any (sample, sigma) of the step, by densities."""
    x0 = (start[:, None] - start_sigma * parts["means"]).double()
    if policy.kind == "dx":
        assert policy.segment is not None
        top = clock(start_sigma, policy.shift)
        bottom, count = max(0.0, top - policy.segment), policy.components - 1
        times = [bottom + (top - bottom) * i / count for i in range(count + 1)]

        def between(sample: Tensor, sigma: float) -> Tensor:
            now = clock(sigma, policy.shift)
            weights = [max(0.0, 1 - abs(now - t) / (times[1] - times[0])) for t in times]
            return sum(w * x0[:, i] for i, w in enumerate(weights)).to(sample)  # pyright: ignore

        return between
    variance = (torch.exp(2 * parts["deviation"]).double() * start_sigma**2 * temperature).expand(
        len(start), 1, 1, 1, 1
    )
    logits = parts["logits"].double() / temperature

    def mean(sample: Tensor, sigma: float) -> Tensor:
        # each Gaussian of x0 times p(sample | x0) / p(start | x0), in natural parameters
        precision, weighted = 1.0 / variance, x0 / variance
        alpha, before = 1 - sigma, 1 - start_sigma
        precision = precision + alpha**2 / sigma**2 - before**2 / start_sigma**2
        weighted = weighted + (alpha / sigma**2) * sample[:, None].double()
        weighted = weighted - (before / start_sigma**2) * start[:, None].double()
        mass = (weighted**2 / precision - x0**2 / variance).sum(2, keepdim=True) / 2
        return ((logits + mass).softmax(1) * weighted / precision).sum(1).to(sample)

    return mean


def clock(sigma: float, shift: float) -> float:
    return sigma / (shift + (1 - shift) * sigma)


def follow_by_hand(
    policy: StepPolicy,
    x0_at: Callable[[Tensor, float], Tensor],
    sample: Tensor,
    now: float,
    following: float,
) -> Tensor:
    top, bottom = clock(now, policy.shift), clock(following, policy.shift)
    count = max(1, round(policy.substeps * (top - bottom)))
    for i in range(count):
        u, lower = (top + (bottom - top) * j / count for j in (i, i + 1))
        sigma, end = (policy.shift * v / (1 + (policy.shift - 1) * v) for v in (u, lower))
        velocity = (sample - x0_at(sample, sigma)) / sigma
        sample = sample + velocity * (end - sigma)
    return sample
