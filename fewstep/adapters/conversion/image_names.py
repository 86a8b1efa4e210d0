"""Names of image transformers in their authors' code and in diffusers."""

from fewstep.adapters.conversion.rules import Rule, rules, same

QKV = "attn.to_q attn.to_k attn.to_v"
ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
PAIR = {"in_layer": "linear_1", "out_layer": "linear_2"}
_MLP = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
TIME_TEXT = "time_text_embed"

SD3 = (
    *rules(
        "joint_blocks.{}.x_block.",
        "transformer_blocks.{}.",
        {
            "attn.qkv": QKV,
            "attn.proj": "attn.to_out.0",
            "attn2.qkv": QKV.replace("attn.", "attn2."),
            "attn2.proj": "attn2.to_out.0",
            "adaLN_modulation.1": "norm1.linear",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
    ),
    *rules(
        "joint_blocks.{}.context_block.",
        "transformer_blocks.{}.",
        {
            "attn.qkv": ADDED_QKV,
            "attn.proj": "attn.to_add_out",
            "adaLN_modulation.1": "~norm1_context.linear",
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
        },
    ),
    *rules("t_embedder.", f"{TIME_TEXT}.timestep_embedder.", _MLP),
    *rules("y_embedder.", f"{TIME_TEXT}.text_embedder.", _MLP),
    *rules(
        "",
        "",
        {
            "context_embedder": "context_embedder",
            "x_embedder.proj": "pos_embed.proj",
            "final_layer.adaLN_modulation.1": "~norm_out.linear",
            "final_layer.linear": "proj_out",
        },
    ),
)

STREAMS = (
    *rules(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_attn.qkv": QKV,
            "img_attn.proj": "attn.to_out.0",
            "img_mod.lin": "norm1.linear",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_attn.qkv": ADDED_QKV,
            "txt_attn.proj": "attn.to_add_out",
            "txt_mod.lin": "norm1_context.linear",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
    ),
    *rules(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {
            "linear1": f"{QKV} proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
        },
    ),
    *rules("time_in.", f"{TIME_TEXT}.timestep_embedder.", PAIR),
    *rules("vector_in.", f"{TIME_TEXT}.text_embedder.", PAIR),
    *rules("guidance_in.", f"{TIME_TEXT}.guidance_embedder.", PAIR),
    *rules(
        "",
        "",
        {"final_layer.adaLN_modulation.1": "~norm_out.linear", "final_layer.linear": "proj_out"},
    ),
)
FLUX = (*STREAMS, *rules("", "", {"img_in": "x_embedder", "txt_in": "context_embedder"}))

_CROSS = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0",
}
_CAPTION = rules(
    "y_embedder.y_proj.", "caption_projection.", {"fc1": "linear_1", "fc2": "linear_2"}
)
PIXART = (
    *rules(
        "blocks.{}.",
        "transformer_blocks.{}.",
        {**_CROSS, "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"},
    ),
    *_CAPTION,
    *rules("t_embedder.", "adaln_single.emb.timestep_embedder.", _MLP),
    *rules("csize_embedder.", "adaln_single.emb.resolution_embedder.", _MLP),
    *rules("ar_embedder.", "adaln_single.emb.aspect_ratio_embedder.", _MLP),
    *rules(
        "",
        "",
        {
            "x_embedder.proj": "pos_embed.proj",
            "t_block.1": "adaln_single.linear",
            "final_layer.linear": "proj_out",
        },
    ),
)
SANA = (
    *rules(
        "blocks.{}.",
        "transformer_blocks.{}.",
        {
            **_CROSS,
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.depth_conv.conv": "ff.conv_depth",
            "mlp.point_conv.conv": "ff.conv_point",
        },
    ),
    *_CAPTION,
    *rules("t_embedder.", "time_embed.emb.timestep_embedder.", _MLP),
    *rules(
        "",
        "",
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_block.1": "time_embed.linear",
            "final_layer.linear": "proj_out",
        },
    ),
)


def _z_image_block(prefix: str) -> tuple[Rule, ...]:
    return (
        *rules(
            prefix,
            prefix,
            {
                "attention.qkv": "attention.to_q attention.to_k attention.to_v",
                "attention.out": "attention.to_out.0",
            },
        ),
        *same(*(f"{prefix}feed_forward.w{i}" for i in (1, 2, 3)), f"{prefix}adaLN_modulation.0"),
    )


Z_IMAGE = (
    *_z_image_block("layers.{}."),
    *_z_image_block("noise_refiner.{}."),
    *_z_image_block("context_refiner.{}."),
    *same("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1"),
    *rules(
        "",
        "",
        {
            "x_embedder": "all_x_embedder.2-1",
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        },
    ),
)

_QWEN_ATTENTION = (*QKV.split(), *ADDED_QKV.split(), "attn.to_out.0", "attn.to_add_out")
_QWEN_STREAM = ("mod.1", "mlp.net.0.proj", "mlp.net.2")
QWEN_IMAGE = same(
    *(f"transformer_blocks.{{}}.{name}" for name in _QWEN_ATTENTION),
    *(f"transformer_blocks.{{}}.{side}_{name}" for side in ("img", "txt") for name in _QWEN_STREAM),
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *(f"{TIME_TEXT}.timestep_embedder.linear_{i}" for i in (1, 2)),
)
