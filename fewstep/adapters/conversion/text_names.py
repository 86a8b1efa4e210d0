"""Names of LoRA layers in text encoders: CLIP and T5, in every dialect."""

import re

_PREFIXED = re.compile(r"(?:base_model\.model\.)?(text_encoder(?:_\d)?)\.(.+)")
_KOHYA = re.compile(r"lora_te(\d?)_(.+)")
_COMFY = re.compile(r"text_encoders\.(clip_l|clip_g|t5xxl)\.transformer\.(.+)")
_CLIP_LAYER = re.compile(
    r"(?:text_model_)?encoder_layers_(\d+)_"
    r"(?:(self_attn)_([qkv]_proj|out_proj)|(mlp)_(fc[12]))"
)
_T5_LAYER = re.compile(
    r"encoder_block_(\d+)_layer_([01])_"
    r"(?:(SelfAttention)_([qkvo])|(DenseReluDense)_(wi_0|wi_1|wi|wo))"
)


def text_target(body: str, family: str | None) -> tuple[str, str] | None:
    """(Pipeline component, module) of a text encoder's layer; None if it is not one.

    Args:
        body: The layer's name, without the part.
        family: Base family: in FLUX and SD3 the encoders have other numbers.
    """
    if match := _PREFIXED.fullmatch(body):
        return match[1], match[2]
    if match := _COMFY.fullmatch(body):
        return _component_of_encoder(match[1], family), match[2]
    if match := _KOHYA.fullmatch(body):
        return _component_of_number(match[1], family), dotted(match[2])
    return None


def dotted(flat: str) -> str:
    """A flattened CLIP or T5 layer name with its dots; as it is if it is of neither."""
    if flat in ("text_projection", "text_model_text_projection"):
        return "text_projection"
    if match := _CLIP_LAYER.fullmatch(flat):
        parts = [part for part in match.groups()[1:] if part]
        return ".".join(["text_model.encoder.layers", match[1], *parts])
    if match := _T5_LAYER.fullmatch(flat):
        parts = [part for part in match.groups()[2:] if part]
        return ".".join(["encoder.block", match[1], "layer", match[2], *parts])
    return flat


def kohya_text_name(component: str, module: str, family: str | None) -> str:
    """What kohya's tools and ComfyUI call a text encoder's layer."""
    number = component.removeprefix("text_encoder").removeprefix("_")
    if not number:
        number = "" if family in ("sd15", "sd2") else "1"
    if family == "flux" and number == "2":
        number = "3"
    return f"lora_te{number}_{module.replace('.', '_')}"


def _component_of_number(number: str, family: str | None) -> str:
    """Kohya's tools call T5 the third encoder in FLUX too, which has no second CLIP."""
    if family == "flux" and number == "3":
        number = "2"
    return f"text_encoder_{number}" if number in ("2", "3") else "text_encoder"


def _component_of_encoder(name: str, family: str | None) -> str:
    if name == "t5xxl":
        return "text_encoder_2" if family == "flux" else "text_encoder_3"
    return "text_encoder" if name == "clip_l" else "text_encoder_2"
