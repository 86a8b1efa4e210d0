"""What is traced computes what the stock network computes, and leaves the stock network as it was.

Oracle: diffusers' own forward, with texts of different lengths in a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from fewstep.export.families.flux import flux_transformer_part
from fewstep.export.families.language_models import language_model_part
from fewstep.export.families.linear_attention import attend_linearly
from fewstep.export.families.pixart import pixart_transformer_part
from fewstep.export.families.qwen_image import qwen_transformer_part
from fewstep.export.families.sana import sana_transformer_part
from fewstep.export.families.text_encoders import masked_t5_part
from fewstep.export.families.wan import wan_transformer_part
from fewstep.export.families.z_image import z_image_transformer_part
from fewstep.export.part import Part
from tests.trainer import backbone_cases as cases
from tests.trainer import tiny_text

Inputs = dict[str, Tensor]
LENGTHS = (40, 7)
"""Real tokens of both texts; Z-Image fills up to 64 and 32."""


def spread(told: Tensor, inputs: Inputs) -> Tensor:
    return told.expand(inputs["hidden_states"].shape[0])


def flux(model: Any, inputs: Inputs) -> Tensor:
    given = {**inputs, "timestep": spread(inputs["timestep"], inputs)}
    return model(**given, return_dict=False)[0]


def masked(model: Any, inputs: Inputs) -> Tensor:
    given: dict[str, Any] = {**inputs, "timestep": spread(inputs["timestep"], inputs)}
    sized = {name: given.pop(name, None) for name in ("resolution", "aspect_ratio")}
    if model.__class__.__name__.startswith("PixArt"):
        given["added_cond_kwargs"] = sized
    found = model(**given, return_dict=False)[0]
    return found[:, : model.config.in_channels]


def qwen(model: Any, inputs: Inputs) -> Tensor:
    count, channels, height, width = inputs["hidden_states"].shape
    packed = FluxPipeline._pack_latents(inputs["hidden_states"], count, channels, height, width)
    found = model(
        **{**inputs, "hidden_states": packed, "timestep": spread(inputs["timestep"], inputs)},
        img_shapes=[[(1, height // 2, width // 2)]] * count,
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(found, 8 * height, 8 * width, 8)


def z_image(model: Any, inputs: Inputs) -> Tensor:
    pairs = zip(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"], strict=True)
    found = model(
        list(inputs["hidden_states"].unsqueeze(2)),
        spread(inputs["timestep"], inputs),
        [row[mask > 0] for row, mask in pairs],
        return_dict=False,
    )[0]
    return torch.stack(found).squeeze(2)


@dataclass(frozen=True)
class Network:
    """A transformer, as a part and as stock calls it."""

    name: str
    build: Callable[[], Any]
    part: Callable[[str, Any], Part]
    stock: Callable[[Any, Inputs], Tensor]


NETWORKS = (
    Network("flux-dev", cases.FLUX_DEV.build, flux_transformer_part, flux),
    Network("flux-schnell", cases.FLUX_SCHNELL.build, flux_transformer_part, flux),
    Network("pixart", cases.build_pixart, pixart_transformer_part, masked),
    Network("pixart-1024", cases.PIXART_1024.build, pixart_transformer_part, masked),
    Network("sana", cases.build_sana, sana_transformer_part, masked),
    Network("qwen-image", cases.build_qwen_image, qwen_transformer_part, qwen),
    Network("z-image", cases.build_z_image, z_image_transformer_part, z_image),
    Network("wan", cases.build_wan21, wan_transformer_part, flux),
)


def inputs_of(part: Part, sizes: dict[str, int]) -> Inputs:
    """An example whose second text is shorter."""
    inputs = part.example(sizes, seed=2)
    for name, value in inputs.items():
        if name.endswith("mask"):
            for row, length in zip(value, LENGTHS, strict=True):
                row[length:] = 0
    return inputs


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_a_part_is_its_stock_network(network: Network) -> None:
    model = network.build().transformer.eval()
    with torch.no_grad():  # diffusers leaves Z-Image's empty, and others' tables small
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.shape[0] == 1:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    part = network.part("transformer", model)
    before = stock_state(model)
    for rows, columns in ((4, 6), (7, 3)):
        sizes = dict(part.sizes)
        sizes |= {"sequence_length": 64} if "sequence_length" in sizes else {}
        if "height" in sizes:
            sizes |= {"height": 2 * rows, "width": 2 * columns}
        inputs = inputs_of(part, sizes)
        with torch.no_grad():
            found, wanted = part.module(*inputs.values()), network.stock(model, inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert stock_state(model) == before


def stock_state(model: Any) -> list[tuple[str, str | None, bool]]:
    """Every module's attention processor, and whether a method was replaced."""
    return [
        (name, str(getattr(module, "processor", None)), "forward" in vars(module))
        for name, module in model.named_modules()
    ]


def test_language_models_are_the_stock_ones_on_real_tokens() -> None:
    ids = torch.randint(3, 11, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(12)[None] < torch.tensor([[12], [5]])).long()
    gemma, qwen3, vision = tiny_text.gemma(8), tiny_text.qwen3(16), tiny_text.qwen_vl(16)
    for stock, inner, layer in (
        (gemma, gemma, -1),
        (qwen3, qwen3, -2),
        (vision, vision.model.language_model, -1),
    ):
        part = language_model_part("text_encoder", inner, layer=layer, config=stock.config)
        with torch.no_grad():
            wanted = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            found = part.module(ids, mask)
        real = mask.bool()
        states = wanted.hidden_states[layer]
        torch.testing.assert_close(found[real], states[real], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[real], wanted.hidden_states[0][real])


def test_a_sliding_window_is_kept() -> None:
    """Shorter than the text, so that half of the layers see less of it."""
    gemma = tiny_text.gemma(8)
    gemma.config.sliding_window = 4
    for layer in gemma.layers:
        layer.self_attn.sliding_window = 4 if layer.self_attn.sliding_window else None
    ids = torch.randint(3, 11, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    part = language_model_part("text_encoder", gemma, layer=-1, config=gemma.config)
    with torch.no_grad():
        found = part.module(ids, mask)
        wanted = gemma(input_ids=ids, attention_mask=mask).last_hidden_state
        gemma.config.sliding_window = 64
        wide = part.module(ids, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, wide, atol=1e-4)


@pytest.mark.parametrize("multilingual", [False, True])
def test_masked_t5_is_the_stock_one(multilingual: bool) -> None:
    model = tiny_text.t5(16, multilingual=multilingual)
    ids = torch.randint(3, 11, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(12)[None] < torch.tensor([[12], [5]])).long()
    with torch.no_grad():
        found = masked_t5_part("text_encoder", model).module(ids, mask)
        wanted = model(ids, attention_mask=mask)[0]
        unmasked = model(ids)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], unmasked[1], atol=1e-3)


def test_linear_attention_gives_zeros_where_no_query_is_positive() -> None:
    """As stock, whose 1e-15 in the divisor graphs' optimisers drop."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = torch.randn(3, 2, 2, 4, 9, generator=generator)
    query, key = query.relu(), key.relu()
    query[..., 3] = 0.0
    found = attend_linearly(query, key, value)
    weights = torch.einsum("bhdn,bhdm->bhnm", query, key)
    wanted = torch.einsum("bhnm,bhdm->bhdn", weights, value)
    wanted = wanted / (weights.sum(-1)[:, :, None] + 1e-15)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[..., 3], torch.zeros(2, 2, 4))
