"""Prompts reach the network exactly as in a stock call, and "" is its null condition.

The oracle is what the stock pipeline, called with text and its own default negative prompt, hands
its network. Encoders are tiny and random, but of the real classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.loading import wrap_pipeline
from tests.trainer import tiny_text
from tests.trainer.backbone_cases import (
    FLUX_DEV,
    HEIGHT_PX,
    PIXART,
    QWEN_IMAGE,
    SANA,
    SD3,
    SD15,
    SDXL,
    WAN21,
    WAN22,
    WIDTH_PX,
    Z_IMAGE,
    Case,
    build_pixart_sigma,
)

PROMPTS = ["a red cat", "two big blue dogs run"]


@dataclass(frozen=True)
class TextCase:
    """A family with text encoders.

    Attributes:
        case: The family.
        encoders: Makes the components that read text.
        arguments: Of a stock call that guides.
        null_first: Whether the null half is first in what the network is given.
        build: Makes the pipeline, where not the family's own.
    """

    case: Case
    encoders: Callable[[], dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 3.0})
    null_first: bool = False
    build: Callable[[], Any] | None = None

    def pipeline(self) -> Any:
        pipe = (self.build or self.case.build)()
        pipe.register_modules(**self.encoders())
        pipe.set_progress_bar_config(disable=True)
        return pipe


def umt5(width: int) -> Any:
    return tiny_text.t5(width, multilingual=True)


PLAIN = {"guidance_scale": 3.0, "use_resolution_binning": False}
WITH_FRAMES = {"guidance_scale": 3.0, "num_frames": 5}
CASES = (
    TextCase(SD15, tiny_text.one(tiny_text.clip, 8), null_first=True),
    TextCase(SDXL, tiny_text.clip_pair, null_first=True),
    TextCase(SD3, tiny_text.sd3_encoders, null_first=True),
    TextCase(
        FLUX_DEV, tiny_text.flux_encoders, {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}
    ),
    TextCase(PIXART, tiny_text.one(tiny_text.t5, 16), PLAIN, null_first=True),
    TextCase(SANA, tiny_text.one(tiny_text.gemma, 8), PLAIN, null_first=True),
    TextCase(
        QWEN_IMAGE,
        tiny_text.one(tiny_text.qwen_vl, 16),
        {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]},
    ),
    TextCase(Z_IMAGE, tiny_text.one(tiny_text.qwen3, 16)),
    TextCase(WAN21, tiny_text.one(umt5, 16), WITH_FRAMES),
    TextCase(WAN22, tiny_text.one(umt5, 16), WITH_FRAMES),
)
SIGMA = TextCase(
    PIXART,
    tiny_text.one(tiny_text.t5, 16),
    PLAIN,
    null_first=True,
    build=build_pixart_sigma,
)
EVERY = pytest.mark.parametrize("text", CASES, ids=lambda text: text.case.name)


@dataclass(frozen=True)
class Row:
    """What the network is given of one prompt: real tokens only, and the pooled embedding."""

    tokens: Tensor
    pooled: Tensor | None


def rows_of(sequence: Any, mask: Tensor | None, pooled: Tensor | None) -> list[Row]:
    real = [row if mask is None else row[mask[i].bool()] for i, row in enumerate(sequence)]
    return [Row(row, None if pooled is None else pooled[i]) for i, row in enumerate(real)]


def stock_rows(pipe: Any, text: TextCase) -> list[Row]:
    """Rows of the prompts, then of their null halves, in a stock call."""
    found: list[Row] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sequence = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        mask = kwargs.get("encoder_attention_mask", kwargs.get("encoder_hidden_states_mask"))
        pooled = kwargs.get("pooled_projections")
        if "added_cond_kwargs" in kwargs:
            pooled = (kwargs["added_cond_kwargs"] or {}).get("text_embeds")
        found.extend(rows_of(sequence, mask, pooled))

    for name in ("unet", "transformer"):
        if pipe.components.get(name) is not None:
            pipe.components[name].register_forward_pre_hook(hook, with_kwargs=True)
    pipe(
        list(PROMPTS),
        height=HEIGHT_PX,
        width=WIDTH_PX,
        num_inference_steps=1,
        output_type="latent",
        **text.arguments,
    )
    count = len(PROMPTS)
    assert len(found) == 2 * count
    return [*found[count:], *found[:count]] if text.null_first else found


def our_rows(condition: Condition) -> list[Row]:
    return rows_of(condition.sequence, condition.mask, condition.pooled)


def assert_same(ours: Row, theirs: Row) -> None:
    torch.testing.assert_close(ours.tokens, theirs.tokens, rtol=1e-4, atol=1e-5)
    assert (ours.pooled is None) == (theirs.pooled is None)
    if ours.pooled is not None:
        torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [*CASES, SIGMA], ids=lambda text: text.case.name)
def test_prompts_are_told_as_in_a_stock_call(text: TextCase) -> None:
    pipe = text.pipeline()
    expected = stock_rows(pipe, text)
    backbone = wrap_pipeline(pipe)
    prompts = list(PROMPTS)
    both = [*our_rows(backbone.encode(prompts)), *our_rows(backbone.encode([""])) * 2]
    assert prompts == PROMPTS  # stock Z-Image would write into the list
    for ours, theirs in zip(both, expected, strict=True):
        assert_same(ours, theirs)
    assert not torch.equal(both[0].tokens, both[1].tokens)


@EVERY
def test_the_empty_prompt_among_others_is_the_null_condition(text: TextCase) -> None:
    backbone = wrap_pipeline(text.pipeline())
    mixed = our_rows(backbone.encode(["", PROMPTS[0], "", PROMPTS[1]]))
    (null,) = our_rows(backbone.encode([""]))
    real = our_rows(backbone.encode(PROMPTS))
    for ours, theirs in zip(mixed, [null, real[0], null, real[1]], strict=True):
        assert_same(ours, theirs)


@EVERY
def test_conditions_fit_the_network(text: TextCase) -> None:
    """Both halves in one call, although prompts and null condition differ in length."""
    backbone = wrap_pipeline(text.pipeline())
    condition, null = backbone.encode(PROMPTS), backbone.encode([""])
    assert condition.sequence.dtype == backbone.dtype
    assert (condition.mask is not None) == text.case.is_masked
    both = condition.beside(null.expand(2))
    shape = backbone.latent_shape(HEIGHT_PX, WIDTH_PX, 5 if backbone.layout.frames else 0)
    sample = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.full((4,), 500.0)
    with torch.no_grad():
        together = backbone.output(backbone.denoiser, sample, timestep, both)
        alone = [
            backbone.output(backbone.denoiser, sample[i : i + 2], timestep[:2], part)
            for i, part in ((0, condition), (2, null.expand(2)))
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "default", "chosen"),
    [
        (CASES[2], 333, 20),  # SD3: 77 tokens of CLIP beside T5's 256
        (CASES[3], 512, 20),
        (CASES[4], 120, 20),
        (SIGMA, 300, 20),
        (CASES[5], 300, 20),
        (CASES[8], 512, 20),
    ],
    ids=["sd3", "flux-dev", "pixart-alpha", "pixart-sigma", "sana", "wan21"],
)
def test_text_lengths_are_those_of_a_call_unless_chosen(
    text: TextCase, default: int, chosen: int
) -> None:
    backbone = wrap_pipeline(text.pipeline())
    assert backbone.encode(PROMPTS).sequence.shape[1] == default
    backbone = wrap_pipeline(text.pipeline(), max_sequence_length=chosen)
    extra = 77 if text.case is SD3 else 0
    assert backbone.encode(PROMPTS).sequence.shape[1] == chosen + extra
    assert backbone.base("x").max_sequence_length == chosen


def test_sdxl_without_zeroed_empty_prompts_encodes_them() -> None:
    pipe = CASES[1].pipeline()
    assert wrap_pipeline(pipe).encode([""]).sequence.abs().max() == 0.0
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    null = wrap_pipeline(pipe).encode([""])
    assert null.sequence.abs().max() > 0.0
    assert null.pooled is not None
    assert null.pooled.abs().max() > 0.0
