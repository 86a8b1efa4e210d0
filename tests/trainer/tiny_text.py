"""Tiny random text encoders of every kind that a family uses, and one tokenizer for all."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

stock: Any = transformers
"""Untyped: its configurations take whatever they are given."""

WORDS = [" ", *"a red cat two big blue dogs run".split()]
LENGTH = 77
"""Of CLIP, which stock pipelines without a tokenizer assume."""
SPECIAL = ["<pad>", "<unk>", "<eos>"]
CHAT_TEMPLATE = "{% for message in messages %}user {{ message['content'] }} end {% endfor %}"


def tokenizer(length: int = LENGTH) -> Any:
    """Knows a few words; every text ends in an end token, also the empty one."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [  # a space is a token: " " and "" differ, as they do for Qwen-Image
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.Split(Regex(r"<\|[a-z_]+\|>|\n"), "isolated"),
        ]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", vocabulary["<eos>"])]
    )
    made = stock.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=length,
        padding_side="right",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


SIZES: dict[str, int] = {"vocab_size": 64, "num_hidden_layers": 2, "intermediate_size": 16}


def clip(width: int, *, projected: bool = False) -> Any:
    """CLIP text encoder; `projected` has a pooled output of the same width."""
    torch.manual_seed(1)
    config = stock.CLIPTextConfig(
        **SIZES,
        hidden_size=width,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kind = stock.CLIPTextModelWithProjection if projected else stock.CLIPTextModel
    return kind(config).eval()


def t5(width: int, *, multilingual: bool = False) -> Any:
    """T5 or UMT5 encoder."""
    torch.manual_seed(2)
    sizes = {"vocab_size": 64, "d_model": width, "d_ff": 16, "d_kv": 4, "num_heads": 2}
    if multilingual:
        return stock.UMT5EncoderModel(stock.UMT5Config(**sizes, num_layers=2)).eval()
    return stock.T5EncoderModel(stock.T5Config(**sizes, num_layers=2)).eval()


def gemma(width: int) -> Any:
    """Gemma 2."""
    torch.manual_seed(3)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    config = stock.Gemma2Config(**SIZES, **heads, hidden_size=width)
    return stock.Gemma2Model(config).eval()


def qwen3(width: int) -> Any:
    """Qwen 3."""
    torch.manual_seed(4)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    return stock.Qwen3Model(stock.Qwen3Config(**SIZES, **heads, hidden_size=width)).eval()


def qwen_vl(width: int) -> Any:
    """Qwen 2.5 VL."""
    torch.manual_seed(5)
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = {
        **SIZES,
        "hidden_size": width,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": rope,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
    }
    config = stock.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=60,
        vision_end_token_id=61,
        vision_token_id=62,
        image_token_id=63,
        video_token_id=59,
    )
    return stock.Qwen2_5_VLForConditionalGeneration(config).eval()


def clip_pair() -> dict[str, Any]:
    return {
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "text_encoder": clip(32),
        "text_encoder_2": clip(32, projected=True),
    }


def flux_encoders() -> dict[str, Any]:
    return {**clip_pair(), "text_encoder_2": t5(32)}


def sd3_encoders() -> dict[str, Any]:
    names = {f"tokenizer{n}": tokenizer() for n in ("", "_2", "_3")}
    clips = {f"text_encoder{n}": clip(8, projected=True) for n in ("", "_2")}
    return {**names, **clips, "text_encoder_3": t5(16)}


def one(encoder: Callable[[int], Any], width: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"tokenizer": tokenizer(), "text_encoder": encoder(width)}
