"""Names of video transformers in their authors' code and in diffusers."""

from fewstep.adapters.conversion.image_names import PAIR, QKV, STREAMS, TIME_TEXT
from fewstep.adapters.conversion.rules import rules, same

_REFINER = "context_embedder.token_refiner.refiner_blocks.{}."
HUNYUAN_VIDEO = (
    *STREAMS,
    *rules("txt_in.t_embedder.", f"context_embedder.{TIME_TEXT}.timestep_embedder.", PAIR),
    *rules("txt_in.c_embedder.", f"context_embedder.{TIME_TEXT}.text_embedder.", PAIR),
    *rules(
        "txt_in.individual_token_refiner.blocks.{}.",
        _REFINER,
        {
            "self_attn.qkv": QKV,
            "self_attn.proj": "attn.to_out.0",
            "mlp.0": "ff.net.0.proj",
            "mlp.2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
    ),
    *rules(
        "",
        "",
        {"img_in.proj": "x_embedder.proj", "txt_in.input_embedder": "context_embedder.proj_in"},
    ),
)

_WAN_LINEARS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_TEXTPAIR = {"0": "linear_1", "2": "linear_2"}
WAN = (
    *rules("blocks.{}.self_attn.", "blocks.{}.attn1.", _WAN_LINEARS),
    *rules(
        "blocks.{}.cross_attn.",
        "blocks.{}.attn2.",
        {
            **_WAN_LINEARS,
            "k_img": "add_k_proj",
            "v_img": "add_v_proj",
            "norm_q": "norm_q",
            "norm_k": "norm_k",
            "norm_k_img": "norm_added_k",
        },
    ),
    *rules(
        "blocks.{}.",
        "blocks.{}.",
        {
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
            "self_attn.norm_q": "attn1.norm_q",
            "self_attn.norm_k": "attn1.norm_k",
        },
    ),
    *rules("text_embedding.", "condition_embedder.text_embedder.", _TEXTPAIR),
    *rules("time_embedding.", "condition_embedder.time_embedder.", _TEXTPAIR),
    *rules(
        "img_emb.proj.",
        "condition_embedder.image_embedder.",
        {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"},
    ),
    *rules(
        "",
        "",
        {
            "patch_embedding": "patch_embedding",
            "time_projection.1": "condition_embedder.time_proj",
            "head.head": "proj_out",
        },
    ),
)
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
LTX = (
    *same(
        *(f"transformer_blocks.{{}}.attn{i}.{name}" for i in (1, 2) for name in LINEARS),
        *("transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.2"),
        *("caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
    ),
    *rules(
        "adaln_single.",
        "time_embed.",
        {
            "emb.timestep_embedder.linear_1": "emb.timestep_embedder.linear_1",
            "emb.timestep_embedder.linear_2": "emb.timestep_embedder.linear_2",
            "linear": "linear",
        },
    ),
    *rules("", "", {"patchify_proj": "proj_in"}),
)
COGVIDEOX = same(
    *(f"transformer_blocks.{{}}.attn1.{name}" for name in LINEARS),
    *(f"transformer_blocks.{{}}.{n}" for n in ("norm1.linear", "norm2.linear")),
    *("transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.2"),
    *("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"),
    *("time_embedding.linear_1", "time_embedding.linear_2"),
)
"""CogVideoX LoRAs come with diffusers' names in every dialect; its SAT names are not in use."""
