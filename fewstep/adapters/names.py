"""How adapter files name things: which module a tensor belongs to, and in whose dialect.

| dialect        | example                                                       |
| -------------- | ------------------------------------------------------------- |
| diffusers/PEFT | transformer.transformer_blocks.0.attn.to_q.lora_A.weight       |
| kohya          | lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight  |
| ComfyUI native | diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_up.weight |
| PEFT           | base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight  |
| bare           | transformer_blocks.0.attn.to_q.lora_A.weight                   |
"""

import re
from dataclasses import dataclass
from typing import Literal

Dialect = Literal["diffusers/PEFT", "kohya", "ComfyUI native", "PEFT", "bare"]
Part = Literal["down", "up", "alpha", "other"]
DENOISER = "denoiser"
"""The component of names that do not say which one they mean."""
_DIFFUSERS = re.compile(r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?)\.")
_KOHYA_TEXT = re.compile(r"lora_te(\d?)_")
_KOHYA_DENOISER = re.compile(r"lora_(?:unet|transformer)_")
_OLD_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora$")
_PARTS: tuple[tuple[str, Part], ...] = (
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_A.default.weight", "down"),
    (".lora_B.default.weight", "up"),
    (".lora_down.weight", "down"),
    (".lora_up.weight", "up"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".alpha", "alpha"),
)
_OLD_PARTS: tuple[tuple[str, Part], ...] = ((".down.weight", "down"), (".up.weight", "up"))


@dataclass(frozen=True, slots=True)
class TensorName:
    """One tensor's name, taken apart.

    Attributes:
        dialect: Whose naming this is.
        component: "unet", "transformer", "text_encoder", ...; `DENOISER` where not said.
        module: Name inside the component, as the file spells it (kohya: with underscores).
        part: Which matrix of the pair; "other" is anything but plain LoRA.
    """

    dialect: Dialect
    component: str
    module: str
    part: Part

    @property
    def is_text_encoder(self) -> bool:
        """Whether this belongs to a text encoder rather than the denoiser."""
        return self.component.startswith("text_encoder")


def parse_name(name: str) -> TensorName:
    """Take a tensor's name apart; never fails, unknown kinds are "other" and "bare"."""
    body, part = _split_part(name)
    dialect, component, module = _split_component(body)
    return TensorName(dialect, component, module, part)


def _split_part(name: str) -> tuple[str, Part]:
    for suffix, part in _PARTS:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], part
    for suffix, part in _OLD_PARTS:
        body = name.removesuffix(suffix)
        if body != name and (match := _OLD_PROCESSOR.search(body)):
            linear = "to_out.0" if match[1] == "to_out" else match[1]
            return f"{body[: match.start()]}.{linear}", part
    return name, "other"


def _split_component(body: str) -> tuple[Dialect, str, str]:
    if match := _DIFFUSERS.match(body):
        return "diffusers/PEFT", match[1], body[match.end() :]
    if match := _KOHYA_TEXT.match(body):
        number = f"_{match[1]}" if match[1] in ("2", "3") else ""
        return "kohya", f"text_encoder{number}", body[match.end() :]
    if match := _KOHYA_DENOISER.match(body):
        return "kohya", DENOISER, body[match.end() :]
    if body.startswith("diffusion_model."):
        return "ComfyUI native", DENOISER, body.removeprefix("diffusion_model.")
    if body.startswith("base_model.model."):
        return "PEFT", DENOISER, body.removeprefix("base_model.model.")
    return "bare", DENOISER, body


def shown(value: object) -> str:
    """A value from a file, fit for a message: escaped and at most 100 characters."""
    text = ascii(value[:200] if isinstance(value, str | list) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."
