"""Every family's backbone says what its stock pipeline says, with and without guidance."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.latents import unpack
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.roles import Role
from tests.trainer.backbone_cases import (
    BATCH,
    FAMILIES,
    HEIGHT_PX,
    PIXART_1024,
    SDXL,
    VARIANTS,
    WAN21,
    WIDTH_PX,
    Case,
    random_sample,
)

EVERY = pytest.mark.parametrize("case", [*FAMILIES, *VARIANTS], ids=lambda case: case.name)


@dataclass(frozen=True)
class StockStep:
    """What a stock pipeline's scheduler was given."""

    timestep: float
    output: Tensor
    sample: Tensor


def stock_steps(
    pipe: Any,
    case: Case,
    *,
    scale: float = 1.0,
    num_steps: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[StockStep]:
    """A few guided steps of the stock pipeline."""
    steps: list[StockStep] = []
    original = pipe.scheduler.step

    def step(output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        steps.append(StockStep(float(timestep), output.clone(), sample.clone()))
        return original(output, timestep, sample, **kwargs)

    pipe.scheduler.step = step
    pipe.set_progress_bar_config(disable=True)
    condition, null = case.condition().cast(dtype), case.null_condition().cast(dtype)
    pipe(
        **case.arguments(condition, null.expand(BATCH), scale),
        height=HEIGHT_PX,
        width=WIDTH_PX,
        num_inference_steps=num_steps,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    pipe.scheduler.step = original
    return steps


def stock_x0(pipe: Any, step: StockStep) -> Tensor:
    """Predicted clean data by the formulas of the stock scheduler."""
    config = pipe.scheduler.config
    if "shift" in config:
        return step.sample - step.timestep / 1000.0 * step.output
    product = pipe.scheduler.alphas_cumprod[round(step.timestep)].double()
    sample, output = step.sample.double(), step.output.double()
    if config.prediction_type == "v_prediction":
        return (product.sqrt() * sample - (1.0 - product).sqrt() * output).float()
    return ((sample - (1.0 - product).sqrt() * output) / product.sqrt()).float()


def image_shaped(case: Case, backbone: Backbone, latents: Tensor) -> Tensor:
    if not case.is_packed:
        return latents
    return unpack(latents, *backbone.latent_shape(HEIGHT_PX, WIDTH_PX)[-2:])


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@EVERY
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_x0_is_what_the_stock_pipeline_predicts(case: Case, scale: float) -> None:
    pipe = case.build()
    backbone = wrap_pipeline(pipe)
    steps = stock_steps(pipe, case, scale=scale)
    assert len(steps) == 2
    for step in steps:
        sample = image_shaped(case, backbone, step.sample).float()
        with torch.no_grad():
            x0 = backbone.guided_x0(
                Role.TEACHER,
                sample,
                backbone.level_batch(backbone.schedule.level(step.timestep), BATCH),
                case.condition(),
                case.null_condition(),
                scale,
            )
        assert error(x0, image_shaped(case, backbone, stock_x0(pipe, step))) <= 1e-5
    assert backbone.evaluations == {"teacher": 2 * BATCH * (1 if scale == 1.0 else 2)}


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_in_bf16_the_network_says_the_same_to_the_last_bit(case: Case) -> None:
    """Timesteps are rounded where stock rounds them, sizes and guidance scales too.

    Five steps at shift 3 pass 923.08, which FLUX and Qwen-Image hear as 924 if it is rounded
    before the division by a thousand, as 920 if after.
    """
    pipe = case.build().to(torch.bfloat16)
    backbone = wrap_pipeline(pipe)
    assert backbone.dtype == torch.bfloat16  # though Wan keeps its first table in float32
    for step in stock_steps(pipe, case, num_steps=5, dtype=torch.bfloat16):
        sample = image_shaped(case, backbone, step.sample).to(torch.bfloat16)
        with torch.no_grad():
            output = backbone.output(
                backbone.denoiser,
                sample,
                torch.full((BATCH,), step.timestep),
                case.condition().cast(torch.bfloat16),
            )
        assert torch.equal(output.float(), image_shaped(case, backbone, step.output.float()))


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_prompts_timesteps_and_masks_matter_far_more_than_the_tolerance(case: Case) -> None:
    backbone = wrap_pipeline(case.build())
    condition, sample = case.condition(), random_sample(backbone)
    timestep = torch.full((BATCH,), 501.0)

    def ask(timestep: Tensor, condition: Condition) -> Tensor:
        with torch.no_grad():
            return backbone.output(backbone.denoiser, sample, timestep, condition)

    plain = ask(timestep, condition)
    assert error(ask(timestep, case.null_condition().expand(BATCH)), plain) > 1e-3
    assert error(ask(timestep + 100.0, condition), plain) > 1e-3
    if condition.mask is not None:
        unmasked = replace(condition, mask=torch.ones_like(condition.mask))
        changed = (ask(timestep, unmasked) - plain).abs().amax(dim=tuple(range(1, plain.ndim)))
        assert changed[1] > 1e-3  # the row with padding
        assert changed[0] < 1e-5
    if condition.pooled is not None:
        other = replace(condition, pooled=condition.pooled.flip(0))
        assert error(ask(timestep, other), plain) > 1e-3


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_a_twin_is_another_denoiser_in_the_same_network(case: Case) -> None:
    """Told -t, every family answers something else, and the same layers learn from it."""
    backbone = wrap_pipeline(case.build())
    sample, condition = random_sample(backbone), case.condition()
    levels = backbone.level_batch(backbone.schedule.level(501.0), BATCH)
    plain, twin = (
        backbone.x0(role, sample, levels, condition) for role in (Role.TEACHER, Role.TEACHER.twin())
    )
    assert twin.isfinite().all()
    assert error(twin.detach(), plain.detach()) > 1e-3
    for answer in (plain, twin):
        layers = [p for name, p in backbone.denoiser.named_parameters() if "to_q" in name]
        gradients = torch.autograd.grad(answer.square().sum(), layers, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0.0 for g in gradients)


@pytest.mark.parametrize("case", [SDXL, PIXART_1024], ids=lambda case: case.name)
def test_the_network_is_told_the_size_of_the_picture(case: Case) -> None:
    backbone = wrap_pipeline(case.build())
    seen: list[Any] = []
    backbone.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    with torch.no_grad():
        backbone.output(
            backbone.denoiser, random_sample(backbone), torch.ones(BATCH), case.condition()
        )
    size = [float(HEIGHT_PX), float(WIDTH_PX)]
    if case is SDXL:
        assert seen[0]["time_ids"].tolist() == [[*size, 0.0, 0.0, *size]] * BATCH
    else:
        assert seen[0]["resolution"].tolist() == [size] * BATCH
        assert seen[0]["aspect_ratio"].tolist() == [[0.5]] * BATCH


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_gradients_flow_to_the_sample(case: Case) -> None:
    backbone = wrap_pipeline(case.build())
    sample = random_sample(backbone).requires_grad_()
    levels = backbone.level_batch(backbone.schedule.level(501.0), BATCH)
    x0 = backbone.x0(Role.TEACHER, sample, levels, case.condition())
    weight = torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    alpha, sigma = levels.alpha[0].item(), levels.sigma[0].item()
    # beyond the sample's own part in x0, which needs no network
    direct = 1.0 / alpha if backbone.prediction == "epsilon" else 1.0
    (gradient,) = torch.autograd.grad((weight * x0).sum(), sample)
    assert gradient.isfinite().all()
    assert float((gradient - direct * weight).abs().max()) > 1e-3 * sigma


def test_a_roles_own_network_answers_in_its_own_precision() -> None:
    """A full copy is float32 on a bf16 base."""
    pipe = WAN21.build().to(torch.bfloat16)
    backbone = wrap_pipeline(pipe)
    backbone.own_networks["critic"] = copy.deepcopy(backbone.denoiser).float()
    sample = random_sample(backbone)
    levels = backbone.level_batch(backbone.schedule.level(501.0), BATCH)
    with torch.no_grad():
        teacher, critic = (
            backbone.x0(role, sample, levels, WAN21.condition())
            for role in (Role.TEACHER, Role.CRITIC)
        )
    assert teacher.dtype == critic.dtype == torch.float32
    assert 0.0 < error(critic, teacher) < 0.05  # equal but for the rounding
    assert backbone.evaluations == {"teacher": BATCH, "critic": BATCH}
