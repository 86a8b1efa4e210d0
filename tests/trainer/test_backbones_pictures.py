"""Latents to pictures and back, in every family's own scale."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.trainer.backbones.codecs import Codec, ImageCodec, VideoCodec
from fewstep.trainer.backbones.guidance import norm_kept_guidance, plain_guidance
from fewstep.trainer.backbones.latents import unpack
from fewstep.trainer.backbones.loading import wrap_pipeline
from tests.tiny.parts import stock
from tests.trainer.backbone_cases import (
    BATCH,
    FAMILIES,
    HEIGHT_PX,
    SD15,
    WIDTH_PX,
    Case,
    random_sample,
)

EVERY = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
FRAMES = 5


def pipeline_with_statistics(case: Case) -> Any:
    """Mean and deviation per channel that are not 0 and 1, where the autoencoder has them."""
    pipe = case.build()
    if case.name.startswith(("qwen", "wan")):
        pipe.vae.register_to_config(
            latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[0.5, 1.5, 2.5, 3.5]
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, case: Case, output_type: str) -> Tensor:
    """One step of the stock pipeline."""
    return pipe(
        **case.arguments(case.condition(), case.null_condition().expand(BATCH), 1.0),
        height=HEIGHT_PX,
        width=WIDTH_PX,
        num_inference_steps=1,
        output_type=output_type,
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
    )[0]


@EVERY
def test_pictures_are_those_the_stock_pipeline_ends_with(case: Case) -> None:
    pipe = pipeline_with_statistics(case)
    backbone = wrap_pipeline(pipe)
    latents = draw(pipe, case, "latent")
    if case.is_packed:
        latents = unpack(latents, *backbone.latent_shape(HEIGHT_PX, WIDTH_PX)[-2:])
    with torch.no_grad():
        ours = backbone.decode_float(latents)
    theirs = draw(pipe, case, "pt")
    if backbone.layout.frames:
        theirs = theirs.movedim(2, 1)  # frames before channels, there
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)
    assert ours.std() > 1e-3
    eight_bit = backbone.decode(latents)
    assert torch.equal(eight_bit, (ours * 255.0).round().to(torch.uint8).movedim(1, -1))


@EVERY
def test_pictures_become_latents_of_the_right_shape(case: Case) -> None:
    backbone = wrap_pipeline(pipeline_with_statistics(case))
    generator = torch.Generator().manual_seed(0)
    frames = (FRAMES,) if backbone.layout.frames else ()
    images = torch.rand(BATCH, 3, *frames, HEIGHT_PX, WIDTH_PX, generator=generator)
    latents = backbone.encode_images(images)
    assert latents.shape == random_sample(backbone).shape
    assert latents.dtype == torch.float32
    assert torch.equal(latents, backbone.encode_images(images))  # the mean, not a sample
    torch.testing.assert_close(latents[1:], backbone.encode_images(images[1:]))
    assert backbone.decode_float(latents).shape == images.shape


@EVERY
def test_pictures_are_differentiable(case: Case) -> None:
    backbone = wrap_pipeline(pipeline_with_statistics(case))
    latents = random_sample(backbone).requires_grad_()
    (gradient,) = torch.autograd.grad(backbone.decode_float(latents).square().sum(), latents)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0.0).all()
    if backbone.layout.frames:  # every latent frame counts
        assert (gradient.transpose(1, 2).flatten(2).norm(dim=2) > 0.0).all()


def test_a_tiny_autoencoder_in_place_of_the_familys_own() -> None:
    """TAESD, and the shipped digits teachers."""
    pipe = SD15.build()
    torch.manual_seed(0)
    pipe.vae = stock.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    backbone = wrap_pipeline(pipe)
    images = torch.rand(BATCH, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    latents = backbone.encode_images(images)
    assert latents.shape == (BATCH, 4, 16, 32)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents, return_dict=False)[0]
    expected = pipe.image_processor.postprocess(decoded, output_type="pt")
    torch.testing.assert_close(backbone.decode_float(latents), expected)


class IdentityVae:
    """An autoencoder that does nothing, so that only the codec's arithmetic is left."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, **config: Any) -> None:
        self.config: Any = SimpleNamespace(**config, get=config.get)

    def encode(self, images: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (images,)

    def decode(self, latents: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (latents,)


@pytest.mark.parametrize(
    ("codec", "vae", "expected"),
    [
        (ImageCodec(), IdentityVae(scaling_factor=0.13), [0.13 * 2.0, 0.13 * 3.0]),
        (ImageCodec(), IdentityVae(scaling_factor=1.5, shift_factor=0.5), [1.5 * 1.5, 1.5 * 2.5]),
        (
            ImageCodec(),
            IdentityVae(scaling_factor=0.5, latents_mean=[1.0, -1.0], latents_std=[2.0, 4.0]),
            [0.5 * 0.5, 0.5 * 1.0],
        ),
        (
            VideoCodec(),
            IdentityVae(latents_mean=[1.0, -1.0], latents_std=[2.0, 4.0]),
            [0.5, 1.0],
        ),
    ],
    ids=["scale", "scale and shift", "scale and statistics", "statistics"],
)
def test_scales_by_hand_and_back(codec: Codec, vae: IdentityVae, expected: list[float]) -> None:
    images = torch.tensor([2.0, 3.0]).reshape(1, 2, 1, 1).expand(3, 2, 4, 4)
    latents = codec.encode(vae, images)
    assert latents[0, :, 0, 0].tolist() == pytest.approx(expected)
    torch.testing.assert_close(codec.decode(vae, latents), images)


def test_guidance_of_scale_1_and_0_is_one_half_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond, sample = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    for combine in (plain_guidance, norm_kept_guidance):
        torch.testing.assert_close(combine(cond, uncond, 1.0, sample), cond)
    torch.testing.assert_close(plain_guidance(cond, uncond, 0.0, sample), uncond)


def test_kept_norms_are_those_of_the_conditional_velocity_in_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    cond, uncond, sample = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    scales = torch.tensor([2.0, 5.0]).reshape(2, 1, 1, 1)
    guided = norm_kept_guidance(cond, uncond, scales, sample)
    alone = [norm_kept_guidance(cond, uncond, scale, sample) for scale in (2.0, 5.0)]
    torch.testing.assert_close(guided, torch.stack([alone[0][0], alone[1][1]]))
    for top in (0, 2):
        for left in (0, 2):
            token = (slice(None), slice(None), slice(top, top + 2), slice(left, left + 2))
            lengths = [(sample - x0)[token].flatten(1).norm(dim=1) for x0 in (guided, cond)]
            torch.testing.assert_close(lengths[0], lengths[1])
            plain = plain_guidance(cond, uncond, scales, sample)
            directions = [
                torch.nn.functional.normalize((sample - x0)[token].flatten(1), dim=1)
                for x0 in (guided, plain)
            ]
            torch.testing.assert_close(directions[0], directions[1])
