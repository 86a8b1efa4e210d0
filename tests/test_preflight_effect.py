"""The effect probe: adapters without effect are errors, those with one cost one call, once."""

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.effect_probe import check_effect, measure_effect
from fewstep.pipeline.effect_watch import watch_effect, watch_pipeline
from fewstep.pipeline.lora_layers import LoraWeights, lora_layers, merge_all, put_on
from tests.tiny_pipelines import FLUX, PIXART, SD3, SD15, WAN22, Z_IMAGE, TinyFamily

FAMILIES = pytest.mark.parametrize(
    "family", [SD15, SD3, FLUX, PIXART, WAN22, Z_IMAGE], ids=lambda f: f.name
)


def with_adapter(
    family: TinyFamily,
    *,
    strength: float = 0.5,
    names: tuple[str, ...] = ("fewstep",),
    component: str | None = None,
) -> Any:
    """A tiny pipeline with adapters of rank 2 on every to_q and to_v, active side by side."""
    pipe: Any = FewStepPipeline.wrap(family.build(), recipe=family.recipe())
    pipe.set_progress_bar_config(disable=True)
    model = pipe.components[component or family.denoisers[0]]
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_v"))
    }
    for seed, adapter in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (outer, inner) in shapes.items():
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, inner, generator=generator)
            up = strength * torch.randn(outer, 2, generator=generator)
            tensors[f"{module}.lora_B.weight"] = up
        ranks, alphas = dict.fromkeys(shapes, 2), dict.fromkeys(shapes, 2.0)
        put_on(model, adapter, LoraWeights(tensors, ranks, alphas))
    return pipe


def call(pipe: Any, family: TinyFamily) -> Tensor:
    """One picture, as tensors or arrays."""
    return pipe(**family.arguments(1), seed=0)[0]


def layers(model: nn.Module) -> Iterator[Any]:
    yield from lora_layers(model).values()


def counted(model: Any) -> list[int]:
    """Grows by one with every call of `forward`, whoever makes it."""
    calls: list[int] = []
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counting
    return calls


@FAMILIES
def test_an_adapter_with_effect_passes_and_costs_one_call_once(family: TinyFamily) -> None:
    pipe = with_adapter(family)
    model = pipe.components[family.denoisers[0]]
    calls = counted(model)
    unprobed = call(pipe, family)
    bare = len(calls)
    watch = watch_effect(model)
    assert torch.equal(call(pipe, family), unprobed)
    assert len(calls) == 2 * bare + 1
    assert [effect.adapters for effect in watch.effects] == [("fewstep",)]
    assert watch.effects[0].relative > 1e-3
    call(pipe, family)
    assert len(calls) == 3 * bare + 1


def test_the_effect_is_the_change_of_the_networks_own_output() -> None:
    """Against the same call with peft's own switch."""
    pipe = with_adapter(SD3)
    arguments = {
        "hidden_states": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": torch.ones(1, 3, 16),
        "pooled_projections": torch.ones(1, 16),
        "timestep": torch.tensor([500.0]),
    }
    effect = measure_effect(pipe.transformer, keywords=arguments)
    with torch.no_grad():
        given = pipe.transformer(**arguments).sample
        for layer in layers(pipe.transformer):
            layer.enable_adapters(False)
        without = pipe.transformer(**arguments).sample
    assert effect.relative == pytest.approx(float((given - without).norm() / without.norm()))
    check_effect(pipe.transformer, effect)


def test_zero_matrices_have_no_effect() -> None:
    pipe = with_adapter(SD3, strength=0.0)
    watch_effect(pipe.transformer)
    with pytest.raises(AdapterError) as caught:
        call(pipe, SD3)
    text = str(caught.value)
    assert "the adapter has no effect: it changes the output of SD3Transformer2DModel by" in text
    assert "2 layers, scale 1, LoRA in float32, on Linear with float32 weights" in text
    assert "\n" not in text


def test_an_alpha_of_zero_has_no_effect_and_is_named_until_it_is_put_right() -> None:
    pipe = with_adapter(SD15)
    for layer in layers(pipe.unet):
        layer.lora_alpha["fewstep"] = 0.0
        layer.set_scale("fewstep", 1.0)
    watch = watch_effect(pipe.unet)
    for _ in range(2):
        with pytest.raises(AdapterError, match="has no effect.*scale 0, LoRA in float32"):
            call(pipe, SD15)
    for layer in layers(pipe.unet):
        layer.lora_alpha["fewstep"] = 2.0
        layer.set_scale("fewstep", 1.0)
    call(pipe, SD15)
    assert not watch.waiting


def weight_0(pipe: Any) -> dict[str, Any]:
    pipe.set_adapters(["fewstep"], [0.0])
    return {}


def disabled(pipe: Any) -> dict[str, Any]:
    pipe.disable_lora()
    return {}


def called_with_scale_0(_: Any) -> dict[str, Any]:
    return {"joint_attention_kwargs": {"scale": 0.0}}


@pytest.mark.filterwarnings("ignore:LoRA layers are disabled")
@pytest.mark.parametrize("switch_off", [weight_0, disabled, called_with_scale_0])
def test_an_adapter_that_the_user_switched_off_is_probed_when_it_is_on_again(
    tmp_path: Path, switch_off: Any
) -> None:
    pipe = wrapped(SD3, tmp_path)
    (watch,) = pipe._fewstep.watches
    pipe(**SD3.arguments(1), seed=0, **switch_off(pipe))
    assert watch.effects == []
    assert watch.waiting == {"fewstep"}
    pipe.enable_lora()
    pipe.set_adapters(["fewstep"], [1.0])
    call(pipe, SD3)
    assert watch.effects[0].relative > 1e-3
    assert not watch.waiting


class Deaf(nn.Linear):
    """A quantised kind of layer whose LoRA wrapper computes the base weight only."""


def test_layers_that_ignore_their_lora_have_no_effect() -> None:
    """What a base layer of an unknown quantisation does: accept the adapter and skip it."""
    pipe = with_adapter(SD3)
    for layer in layers(pipe.transformer):
        layer.base_layer.__class__ = Deaf
        layer.forward = layer.base_layer.forward
    watch_effect(pipe.transformer)
    with pytest.raises(AdapterError, match="no effect.* on Deaf with float32 weights"):
        call(pipe, SD3)


def test_float8_weights_are_named() -> None:
    pipe = with_adapter(SD3, strength=0.0)
    for layer in layers(pipe.transformer):
        base = layer.base_layer
        compute = base.weight.data.clone()
        base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)
        base.forward = lambda x, w=compute, b=base: nn.functional.linear(x, w, b.bias)
    watch_effect(pipe.transformer)
    with pytest.raises(AdapterError, match="Linear with float8_e4m3fn weights.*quantis"):
        call(pipe, SD3)


def test_a_style_lora_stays_on_and_does_not_hide_a_dead_adapter() -> None:
    pipe = with_adapter(SD3, names=("style", "fewstep"))
    for layer in layers(pipe.transformer):
        layer.lora_B["fewstep"].weight.data.zero_()
    before = [
        (layer.active_adapters, layer.lora_A["style"].weight) for layer in layers(pipe.transformer)
    ]
    watch_effect(pipe.transformer)
    with pytest.raises(AdapterError, match="has no effect"):
        call(pipe, SD3)
    after = [
        (layer.active_adapters, layer.lora_A["style"].weight) for layer in layers(pipe.transformer)
    ]
    assert [names for names, _ in after] == [names for names, _ in before]
    assert not any(weight.requires_grad for _, weight in after)


def test_experts_are_checked_one_by_one_as_their_turn_comes() -> None:
    pipe = with_adapter(SD3, names=("fewstep_high", "fewstep_low"))
    model = pipe.transformer
    for layer in layers(model):
        layer.lora_B["fewstep_low"].weight.data.zero_()

    def activate(name: str) -> None:
        for layer in layers(model):
            layer.set_adapter(name, inference_mode=True)

    activate("fewstep_high")
    watch = watch_effect(model)
    call(pipe, SD3)
    assert watch.waiting == {"fewstep_low"}
    call(pipe, SD3)
    assert len(watch.effects) == 1
    activate("fewstep_low")
    with pytest.raises(AdapterError, match="has no effect"):
        call(pipe, SD3)
    assert watch.waiting == {"fewstep_low"}


def test_both_networks_of_wan22_are_probed_by_themselves() -> None:
    pipe = with_adapter(WAN22, component="transformer_2")
    assert not watch_effect(pipe.transformer).waiting
    (watch,) = watch_pipeline(pipe)
    assert watch.waiting == {"fewstep"}
    call(pipe, WAN22)
    assert watch.effects[0].relative > 1e-3


@pytest.mark.slow
def test_a_compiled_network_is_left_alone() -> None:
    pipe = with_adapter(SD3, strength=0.0)
    watch = watch_effect(pipe.transformer)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch._dynamo.reset()
    call(pipe, SD3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    call(pipe, SD3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert watch.effects == []


def test_an_adapter_that_overflows_is_told_from_a_base_that_does() -> None:
    pipe = with_adapter(SD3)
    for layer in layers(pipe.transformer):
        layer.set_scale("fewstep", math.inf)
    watch_effect(pipe.transformer)
    with pytest.raises(AdapterError, match="the adapter makes SD3Transformer2DModel give NaN"):
        call(pipe, SD3)
    pipe = with_adapter(SD3)
    pipe.transformer.proj_out.bias.data.fill_(math.nan)
    watch_effect(pipe.transformer)
    with pytest.raises(PipelineError, match="even without the adapter"):
        call(pipe, SD3)


def test_a_fused_or_missing_adapter_cannot_be_probed() -> None:
    pipe = with_adapter(SD3)
    merge_all(pipe.transformer)
    assert not any(isinstance(m, LoraLayer) for m in pipe.transformer.modules())
    assert not watch_effect(pipe.transformer).waiting
    with pytest.raises(PipelineError, match="before it is fused"):
        measure_effect(
            pipe.transformer,
            (torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 16)),
            {"pooled_projections": torch.zeros(1, 16), "timestep": torch.tensor([1.0])},
        )


def test_a_stopped_watch_and_a_training_step_measure_nothing() -> None:
    pipe = with_adapter(SD3, strength=0.0)
    watch = watch_effect(pipe.transformer)
    watch.stop()
    call(pipe, SD3)
    watch = watch_effect(pipe.transformer)
    with torch.enable_grad():
        pipe.transformer(
            hidden_states=torch.zeros(1, 4, 8, 8),
            encoder_hidden_states=torch.zeros(1, 3, 16),
            pooled_projections=torch.zeros(1, 16),
            timestep=torch.tensor([1.0]),
        )
    assert watch.effects == []
    assert watch.waiting == {"fewstep"}


def test_offloaded_models_are_probed_where_they_run() -> None:
    """accelerate moves weights inside `forward`; the second call goes through it too."""
    accelerate = pytest.importorskip("accelerate")
    pipe = with_adapter(SD3)
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
    watch = watch_effect(pipe.transformer)
    with torch.no_grad():
        pipe.transformer(
            hidden_states=torch.zeros(1, 4, 8, 8),
            encoder_hidden_states=torch.zeros(1, 3, 16),
            pooled_projections=torch.zeros(1, 16),
            timestep=torch.tensor([1.0]),
        )
    assert watch.effects[0].relative > 1e-3


def test_a_pickled_adapter_draws_what_its_safetensors_twin_draws(tmp_path: Path) -> None:
    """Through `FewStepPipeline.wrap`."""
    tensors = {
        f"transformer.{name}": values
        for name, values in safetensors.torch.load_file(saved_adapter(tmp_path)).items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "twin.safetensors")
    torch.save(tensors, tmp_path / "twin.pt")
    pictures = []
    for suffix in ("safetensors", "pt"):
        pipe: Any = FewStepPipeline.wrap(
            SD3.build(), adapter=tmp_path / f"twin.{suffix}", recipe=SD3.recipe()
        )
        pipe.set_progress_bar_config(disable=True)
        (watch,) = pipe._fewstep.watches
        pictures.append(call(pipe, SD3))
        assert watch.effects[0].relative > 1e-3
    assert torch.equal(*(torch.as_tensor(picture) for picture in pictures))


def saved_adapter(folder: Path, family: TinyFamily = SD3, strength: float = 1.0) -> Path:
    """Rank 2 on every to_q, names as in the model."""
    generator = torch.Generator().manual_seed(3)
    model: Any = family.build().components[family.denoisers[0]]
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith("to_q"):
            down = torch.randn(2, module.in_features, generator=generator)
            up = strength * torch.randn(module.out_features, 2, generator=generator)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    safetensors.torch.save_file(tensors, folder / "bare.safetensors")
    return folder / "bare.safetensors"


def wrapped(family: TinyFamily, folder: Path, *, strength: float = 1.0, **options: Any) -> Any:
    """A tiny pipeline with an adapter from a file."""
    path = saved_adapter(folder, family, strength)
    pipe: Any = FewStepPipeline.wrap(
        family.build(), adapter=path, recipe=family.recipe(), **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@FAMILIES
@pytest.mark.parametrize("experts", ["adapters", "hotswap"])
def test_an_attached_adapter_is_probed_in_the_first_picture_and_changes_none(
    tmp_path: Path, family: TinyFamily, experts: str
) -> None:
    probed = wrapped(family, tmp_path, experts=experts)
    plain = wrapped(family, tmp_path, experts=experts, probe=False)
    model, other = (pipe.components[family.denoisers[0]] for pipe in (probed, plain))
    assert model._forward_hooks
    assert not other._forward_hooks
    calls, fewer = counted(model), counted(other)
    random_state = torch.get_rng_state()
    assert torch.equal(torch.as_tensor(call(probed, family)), torch.as_tensor(call(plain, family)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(calls) == len(fewer) + 1
    assert not model._forward_hooks
    assert probed._fewstep.watches[0].effects[0].relative > 1e-3
    assert torch.equal(torch.as_tensor(call(probed, family)), torch.as_tensor(call(plain, family)))
    assert len(calls) == len(fewer) + 1


@pytest.mark.parametrize("experts", ["adapters", "hotswap"])
def test_a_dead_adapter_stops_every_picture_unless_the_probe_is_off(
    tmp_path: Path, experts: str
) -> None:
    pipe = wrapped(SD3, tmp_path, strength=0.0, experts=experts)
    for _ in range(2):
        with pytest.raises(AdapterError, match="the adapter has no effect"):
            call(pipe, SD3)
    call(wrapped(SD3, tmp_path, strength=0.0, probe=False), SD3)


def test_a_scale_of_zero_is_the_users_wish(tmp_path: Path) -> None:
    pipe = wrapped(SD3, tmp_path, adapter_scale=0.0)
    bare: Any = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    bare.set_progress_bar_config(disable=True)
    assert torch.equal(call(pipe, SD3), call(bare, SD3))


def test_the_watch_ends_with_the_adapter(tmp_path: Path) -> None:
    """Unwrapped, fused by fewstep, or merged into copies from the start."""
    pipe = wrapped(SD3, tmp_path)
    assert not pipe.unwrap().transformer._forward_hooks
    fused = wrapped(SD3, tmp_path).fuse()
    call(fused, SD3)
    assert not fused.transformer._forward_hooks
    assert wrapped(SD3, tmp_path, experts="fused")._fewstep.watches == ()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_watches_its_own_network(tmp_path: Path, clone: Any) -> None:
    pipe = wrapped(SD3, tmp_path)
    second = clone(pipe)
    assert torch.equal(call(second, SD3), call(pipe, SD3))
    for one in (pipe, second):
        assert len(one._fewstep.watches[0].effects) == 1
        assert not one.transformer._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["whole", "blocks"])
def test_a_network_compiled_before_its_first_picture_is_compiled_once(
    tmp_path: Path, compiled: str
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = wrapped(SD3, tmp_path)
    model = pipe.transformer
    for module in [model] if compiled == "whole" else model.transformer_blocks:
        module.compile(backend="eager", fullgraph=True)
    call(pipe, SD3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    call(pipe, SD3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert pipe._fewstep.watches[0].effects == []
