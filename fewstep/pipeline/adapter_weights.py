"""An adapter file as weights in the names of a pipeline's models, checked before anything changes.

Whatever naming the file has (diffusers, PEFT, kohya, ComfyUI, musubi), what comes out is one LoRA
per model with everything of the file in it; a file that fits only in part is an error.
"""

from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.adapters import AdapterHeader, preflight
from fewstep.adapters.conversion import convert_to_diffusers
from fewstep.adapters.conversion.tensor_reading import open_tensors
from fewstep.adapters.kinds import Rotation, adapter_parts
from fewstep.adapters.names import parse_name
from fewstep.errors import AdapterError
from fewstep.pipeline.lora_layers import (
    MAGNITUDE,
    Angles,
    LoraWeights,
    plain_model,
    weight_shapes,
)

DENOISERS = ("unet", "transformer", "transformer_2")
Shapes = Mapping[str, tuple[int, ...]]


def read_parts(
    pipe: DiffusionPipeline, header: AdapterHeader, component: str, *, is_expert: bool
) -> dict[str, LoraWeights]:
    """Read a file for one denoiser of a pipeline, and for its text encoders.

    Args:
        pipe: The pipeline; it is only looked at.
        header: The file.
        component: The denoiser that the file is for.
        is_expert: Whether it is one of several, of which each serves some steps or prompts.

    Returns:
        Component -> its LoRA, in the names of its model; the denoiser first.

    Raises:
        AdapterError: The file is damaged, or not all of it fits.
    """
    _check_component(header, component, is_expert=is_expert)
    shapes = weight_shapes(_model(pipe, component))
    preflight(header, shapes, component=component)
    kinds = adapter_parts(header)
    if rotations := kinds.rotations_on(component):
        return {component: LoraWeights({}, {}, {}, rotations=_angles(header, rotations))}
    converted = convert_to_diffusers(kinds.lora, shapes, component=component)
    parts = {
        component: LoraWeights(
            _peft_names(converted.tensors, shapes),
            converted.ranks,
            converted.alphas,
            converted.extras,
        )
    }
    if is_expert and converted.text_tensors:
        raise AdapterError(
            f"{header.path}: is for some of the steps or prompts, but has LoRA modules for "
            f"{min(converted.text_tensors)}, whose text is encoded once for all; use a file "
            "without them"
        )
    for encoder, tensors in converted.text_tensors.items():
        parts[encoder] = _text_part(pipe, header, encoder, tensors, converted.text_alphas[encoder])
    return parts


def _check_component(header: AdapterHeader, component: str, *, is_expert: bool) -> None:
    named = {parse_name(name).component for name in header.tensors} & set(DENOISERS)
    others = sorted(named - {component})
    # Files of either expert alone are written for "transformer"; the caller knows better.
    is_plain = named <= {"transformer"} or component in named
    if others and not (is_expert and is_plain):
        raise AdapterError(
            f"{header.path}: has LoRA modules for {others[0]}, but this pipeline's few-step "
            f"adapter goes on {component}; use a file made for {component}"
        )


def _angles(header: AdapterHeader, rotations: Sequence[Rotation]) -> dict[str, Angles]:
    read = open_tensors(header)
    return {r.name.module: Angles(read(r.a_name), read(r.b_name)) for r in rotations}


def _model(pipe: DiffusionPipeline, component: str) -> nn.Module:
    model = plain_model(pipe.components.get(component))
    assert model is not None
    return model


def _peft_names(tensors: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """peft keeps a DoRA's magnitudes in a layer of their own, shaped like the convolution."""
    named = {}
    for name, tensor in tensors.items():
        if not name.endswith(MAGNITUDE):
            named[name] = tensor
            continue
        dims = len(shapes[f"{name.removesuffix(f'.{MAGNITUDE}')}.weight"])
        named[f"{name}.weight"] = tensor.reshape(1, -1, *[1] * (dims - 2)) if dims > 2 else tensor
    return named


def _text_part(
    pipe: DiffusionPipeline,
    header: AdapterHeader,
    encoder: str,
    tensors: Mapping[str, Tensor],
    alphas: Mapping[str, float],
) -> LoraWeights:
    if plain_model(pipe.components.get(encoder)) is None:
        raise AdapterError(
            f"{header.path}: has LoRA modules for {encoder}, which this pipeline was loaded "
            f"without; load the base with its {encoder}"
        )
    shapes = weight_shapes(_model(pipe, encoder))
    named: dict[str, Tensor] = {}
    ranks, alphas_there = {}, {}
    for module, alpha in alphas.items():
        there = _text_module(module, shapes)
        down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        wanted = shapes.get(f"{there}.weight")
        if wanted != (up.shape[0], down.shape[1]):
            problem = "is not in it" if wanted is None else f"has the shape {list(wanted)} there"
            raise AdapterError(
                f"{header.path}: its LoRA does not fit {encoder}: {module} {problem}; use an "
                "adapter made for this base"
            )
        ranks[there], alphas_there[there] = down.shape[0], alpha
        for name in (n for n in tensors if n.startswith(f"{module}.lora_")):
            named[there + name.removeprefix(module)] = tensors[name]
    return LoraWeights(_peft_names(named, shapes), ranks, alphas_there)


def _text_module(module: str, shapes: Shapes) -> str:
    """transformers 5 dropped CLIP's "text_model." from some classes; files still have it."""
    plain = module.removeprefix("text_model.")
    spellings = (module, plain, f"text_model.{plain}")
    return next((name for name in spellings if f"{name}.weight" in shapes), module)
