"""Stock diffusers and transformers classes at the size of the digits pipeline.

Everything here is an ordinary class with an ordinary config, so whatever loads the full-size
models (diffusers, ONNX export, ComfyUI) loads these. Knows nothing of training.
"""

from string import ascii_lowercase
from typing import Any

from diffusers import AutoencoderTiny, SD3Transformer2DModel, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from fewstep.digits.data import WORDS

TEXT_LENGTH = 8
"""Tokens per prompt, both ends included."""
TEXT_WIDTH = 64
LATENT_CHANNELS = 16
LATENT_SIZE = 8
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer that knows letters, figures and the words of our prompts."""
    symbols = list(ascii_lowercase) + [str(i) for i in range(10)] + list(".,!?'-")
    vocabulary = symbols + [s + "</w>" for s in symbols]
    merges: list[tuple[str, str]] = []
    for word in (*WORDS, "a", "the", "digit", "handwritten"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces = ["".join(pair), *pieces[2:]]
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    tokens = [*vocabulary, START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,  # pyright: ignore[reportArgumentType]
        model_max_length=TEXT_LENGTH,
    )


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Config of the small CLIP text encoders: two layers of width 64."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=_one_id(tokenizer.bos_token_id),
        eos_token_id=_one_id(tokenizer.eos_token_id),
        pad_token_id=_one_id(tokenizer.pad_token_id),
    )


def _one_id(token_id: Any) -> int:
    """CLIP's special tokens have one id each; transformers' types allow more."""
    return int(token_id)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The SD1.5 kind of text encoder: sequence features only."""
    return CLIPTextModel(text_config(tokenizer))


def build_projected_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """The SD3 kind of text encoder: sequence features and a pooled projection."""
    return CLIPTextModelWithProjection(text_config(tokenizer))


def build_autoencoder() -> AutoencoderTiny:
    """TAESD's published layout with 16 latent channels (as taesd3): 64 px <-> 8x8 latents."""
    return AutoencoderTiny(latent_channels=LATENT_CHANNELS)


def build_transformer() -> SD3Transformer2DModel:
    """A two-block MMDiT; head_dim 64 and layers = heads, the shape rule SD3 loaders rely on."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """An SD1.5-style epsilon-prediction UNet on 8x8 latents."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(48, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
