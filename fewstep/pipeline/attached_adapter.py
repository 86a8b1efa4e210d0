"""LoRA files on a pipeline's models: attach with proof that all of it arrived, fuse, remove."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.adapters import AdapterHeader
from fewstep.adapters.conversion.tensor_reading import open_tensors
from fewstep.adapters.kinds import AdapterKind, adapter_parts
from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline.adapter_weights import DENOISERS, read_parts
from fewstep.pipeline.lora_layers import (
    LoraWeights,
    layers_with,
    lora_layers,
    merge_all,
    offloading_paused,
    plain_model,
    put_on,
    take_off,
)

ADAPTER_NAME = "fewstep"


@dataclass(frozen=True, slots=True)
class AttachedAdapter:
    """An adapter on a pipeline.

    Attributes:
        path: The file.
        scale: What its alpha / rank is multiplied with; weight 1 in `set_adapters` means this.
        is_fused: Whether its weights are merged into the base's; it cannot be switched off then.
        name: What peft calls it, for `set_adapters`.
        component: The denoiser it changes.
        expert: Which of the recipe's experts or routes it is; None without.
        kind: What it does to the weights; one that is no plain LoRA cannot be switched off.
    """

    path: Path
    scale: float
    is_fused: bool = False
    name: str = ADAPTER_NAME
    component: str = ""
    expert: int | None = None
    kind: AdapterKind = "lora"


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A file read for one denoiser and checked against it; nothing is attached yet.

    Attributes:
        attached: What it will be called once it is on.
        parts: Component -> its LoRA: the denoiser's, then any text encoder's.
        head: Of an adapter with a head (two-time, policy), its tensors by parameter name.
    """

    attached: AttachedAdapter
    parts: Mapping[str, LoraWeights]
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def denoiser(self) -> LoraWeights:
        """The denoiser's part."""
        return self.parts[self.attached.component]


def read_weights(
    pipe: DiffusionPipeline,
    header: AdapterHeader,
    scale: float,
    *,
    expert: int | None = None,
    name: str = ADAPTER_NAME,
    component: str | None = None,
) -> AdapterWeights:
    """Read an adapter for a pipeline and check that all of it fits.

    Args:
        pipe: The pipeline; it is only looked at.
        header: The file.
        scale: What its alpha / rank will be multiplied with.
        expert: Which of the recipe's experts or routes it is.
        name: What peft shall call it.
        component: The denoiser it is for; None takes the pipeline's own.

    Raises:
        AdapterError: The file is damaged, or does not fit the models of this pipeline.
        PipelineError: The pipeline has no such denoiser.
    """
    component = main_denoiser(pipe)[0] if component is None else component
    denoiser_of(pipe, component)
    parts = read_parts(pipe, header, component, is_expert=expert is not None)
    kinds = adapter_parts(header)
    attached = AttachedAdapter(
        header.path, scale, name=name, component=component, expert=expert, kind=kinds.kind
    )
    read = open_tensors(header)
    head = kinds.two_time or kinds.policy
    return AdapterWeights(attached, parts, {name: read(full) for name, full in head.items()})


def attach(pipe: DiffusionPipeline, adapter: AdapterWeights) -> None:
    """Put an adapter on, beside what is on already, and check that all of it arrived.

    diffusers loads what it recognises and says little of the rest; a half-loaded adapter gives a
    blurred picture, so here it is an error and the pipeline is left as it was.

    Raises:
        AdapterError: Not all of it could be loaded.
        PipelineError: An adapter of that name is already there.
    """
    name = adapter.attached.name
    for component in adapter.parts:
        if layers_with(pipe.components[component], name):
            raise _is_taken(name)
    with offloading_paused(pipe):
        try:
            for component, weights in adapter.parts.items():
                _attach_part(pipe.components[component], component, adapter, weights)
        except BaseException:
            detach(pipe, [name])
            raise


def check_name_is_free(pipe: DiffusionPipeline, name: str) -> None:
    """Refuse a name that an adapter on the pipeline has.

    Raises:
        PipelineError: One has.
    """
    if any(layers_with(component, name) for component in pipe.components.values()):
        raise _is_taken(name)


def detach(pipe: DiffusionPipeline, names: Sequence[str]) -> None:
    """Remove adapters; layers go back to plain ones where no other adapter needs them."""
    for component in pipe.components.values():
        model = plain_model(component)
        for name in names:
            if model is not None and layers_with(model, name):
                take_off(model, name)


def fuse(pipe: DiffusionPipeline) -> None:
    """Merge the active LoRAs into the weights, in every component that has one.

    A plain `pipe.fuse_lora()` knows one component per pipeline class: on Wan 2.2 it would merge the
    high-noise expert, and `unload_lora_weights` would then drop the other's LoRA.

    Raises:
        AdapterError: Merged weights would not be finite.
    """
    with offloading_paused(pipe):
        for name in adapted_components(pipe):
            model = plain_model(pipe.components[name])
            assert model is not None
            try:
                merge_all(model)
            except ValueError as error:
                raise AdapterError(f"{name}: the adapter cannot be merged ({error})") from error


def adapted_components(pipe: DiffusionPipeline) -> list[str]:
    """Components whose layers are wrapped by LoRA, ours or anyone's."""
    return [name for name, component in pipe.components.items() if lora_layers(component)]


def check_savable(pipe: DiffusionPipeline) -> None:
    """Refuse to save LoRA layers: diffusers would write names that it replaces by random weights.

    Raises:
        PipelineError: There are some, ours or anyone's.
    """
    adapted = adapted_components(pipe)
    if adapted:
        raise PipelineError(
            f"{' and '.join(adapted)} has LoRA layers attached, which do not survive saving; "
            "fuse() first to save the few-step model, or unwrap() to save the base"
        )


def main_denoiser(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    """Name and model of the component that few-step adapters change."""
    for name in DENOISERS:
        model = plain_model(pipe.components.get(name))
        if model is not None:
            return name, model
    raise PipelineError(
        f"{type(pipe).__name__} has no denoiser named {', '.join(DENOISERS)}; "
        "pass the recipe alone, without an adapter"
    )


def denoiser_of(pipe: DiffusionPipeline, component: str) -> nn.Module:
    """The model of a component that a recipe names.

    Raises:
        PipelineError: The pipeline has no such model.
    """
    model = plain_model(pipe.components.get(component))
    if model is None:
        raise PipelineError(
            f"an expert of this recipe is for {component}, which {type(pipe).__name__} was loaded "
            f"without; load the base with its {component}"
        )
    return model


def _attach_part(
    component: object, where: str, adapter: AdapterWeights, weights: LoraWeights
) -> None:
    attached = adapter.attached
    model = plain_model(component)
    assert model is not None
    if not weights.ranks:  # nothing but whole differences
        return
    # In alpha, so that weight 1 in set_adapters is the recipe's scale, whatever that is.
    alphas = {module: attached.scale * alpha for module, alpha in weights.alphas.items()}
    try:
        put_on(model, attached.name, replace(weights, alphas=alphas))
    except Exception as error:  # peft raises what it likes; none of it is a sentence for a user
        raise AdapterError(
            f"{attached.path}: its LoRA for {where} could not be loaded ({error})"
        ) from error
    layers = layers_with(model, attached.name)
    if set(layers) != set(weights.ranks):
        difference = min(set(layers) ^ set(weights.ranks))
        raise AdapterError(
            f"{attached.path}: {len(layers)} of {len(weights.ranks)} LoRA modules were loaded "
            f"(first difference: {difference}); use an adapter made for this base"
        )


def _is_taken(name: str) -> PipelineError:
    return PipelineError(
        f"an adapter {name!r} is already attached; unwrap() the pipeline, or delete_adapters() "
        "where it is not ours, first"
    )
