"""Policy heads: their file, their place in the hosts, and the pictures they draw."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fewstep.adapters import (
    adapter_parts,
    inspect_adapter,
    read_header,
    save_adapter,
    save_policy_adapter,
)
from fewstep.adapters.conversion.convert import convert_file
from fewstep.doctor.adapter_file import examine_adapter
from fewstep.doctor.stock_load import try_stock_load
from fewstep.doctor.subject import StockLoad
from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.modular import FewStepModularPipeline
from fewstep.pipeline.stock_scheduler import stock_scheduler
from fewstep.pipeline.teacher_refine import TeacherRefine
from fewstep.recipe import Lora, StepPolicy
from tests.expert_files import expert_file
from tests.head_files import (
    assert_bits_equal,
    denoiser,
    lora_tensors,
    state_of,
    wrapped,
)
from tests.policy_files import (
    DX,
    GM,
    HOSTS,
    SD3_PATCHES,
    authors_names,
    drawn_by_hand,
    head_tensors,
    policy_file,
    policy_recipe,
    stock_head,
    unpacked,
)
from tests.test_pipeline_modular import modular
from tests.test_pipeline_offload import (
    hooks_on,
    offload_blocks,
    offload_leaves,
    offload_models,
)
from tests.tiny_pipelines import FLUX, QWEN_IMAGE, SD3, WAN21, TinyFamily, stock

POLICIES = pytest.mark.parametrize("policy", [DX, GM], ids=["dx", "gm"])
FAMILIES = pytest.mark.parametrize("family", HOSTS, ids=lambda family: family.name)


def draw(pipe: Any, family: TinyFamily, **arguments: Any) -> Tensor:
    return pipe(**{**family.arguments(1), "seed": 0, **arguments})[0]


def picture(pipe: Any, family: TinyFamily) -> Tensor:
    """Latents as (B, C, h, w)."""
    drawn = draw(pipe, family)
    return drawn if family.family == "sd3" else unpacked(drawn, *family.latent_shape[-2:])


def plain_file(family: TinyFamily, path: Path) -> Path:
    """The same LoRA without a head."""
    tensors, recipe = lora_tensors(family, 1), family.recipe()
    return save_adapter(path, tensors, recipe=recipe, rank=2, alpha=2.0, title="plain")


# --- pictures


@POLICIES
@FAMILIES
def test_a_policy_is_followed_as_written_by_hand(
    family: TinyFamily, policy: StepPolicy, tmp_path: Path
) -> None:
    head = head_tensors(family, policy)
    file = policy_file(family, tmp_path / "a.safetensors", policy, head=head)
    pipe = wrapped(family, adapter=file)
    expected = drawn_by_hand(family, policy, head, policy_recipe(family, policy))
    torch.testing.assert_close(picture(pipe, family), expected, atol=1e-4, rtol=1e-4)
    assert f"policy ({policy.kind}, 3 components)" in pipe.describe()


@POLICIES
@FAMILIES
def test_components_that_all_are_the_stock_answer_draw_the_stock_picture(
    family: TinyFamily, policy: StepPolicy, tmp_path: Path
) -> None:
    head = stock_head(family, policy)
    file = policy_file(family, tmp_path / "a.safetensors", policy, head=head)
    plain = plain_file(family, tmp_path / "b.safetensors")
    expected = draw(wrapped(family, adapter=plain), family)
    drawn = draw(wrapped(family, adapter=file), family)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


@FAMILIES
def test_unwrap_gives_the_network_back_bit_for_bit(family: TinyFamily, tmp_path: Path) -> None:
    head = head_tensors(family, GM, with_norm=True)
    pipe = wrapped(family, adapter=policy_file(family, tmp_path / "a.safetensors", GM, head=head))
    model: Any = denoiser(pipe, family)
    draw(pipe, family)
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, family), state_of(family.build(), family))
    before: Any = denoiser(family.build(), family)
    assert model.out_channels == before.out_channels
    assert type(model.proj_out) is torch.nn.Linear


@pytest.mark.parametrize("experts", ["adapters", "fused", "hotswap"])
@pytest.mark.parametrize("family", [SD3_PATCHES, FLUX], ids=lambda family: family.name)
def test_a_trained_norm_and_every_way_to_carry_the_lora(
    family: TinyFamily, experts: str, tmp_path: Path
) -> None:
    head = head_tensors(family, GM, with_norm=True)
    file = policy_file(family, tmp_path / "a.safetensors", GM, head=head)
    pipe = wrapped(family, adapter=file, experts=experts)
    expected = drawn_by_hand(family, GM, head, policy_recipe(family, GM))
    torch.testing.assert_close(picture(pipe, family), expected, atol=1e-4, rtol=1e-4)


def test_a_lora_on_the_norm_leaves_with_the_head(tmp_path: Path) -> None:
    model: Any = denoiser(SD3.build(), SD3)
    layer = model.norm_out.linear
    lora = {
        "norm_out.linear.lora_A.weight": torch.randn(2, layer.in_features),
        "norm_out.linear.lora_B.weight": torch.randn(layer.out_features, 2),
    }
    file = save_policy_adapter(
        tmp_path / "a.safetensors",
        lora,
        head_tensors(SD3, GM),
        recipe=policy_recipe(SD3, GM),
        rank=2,
        alpha=2.0,
        title="on the norm",
    )
    pipe = wrapped(SD3, adapter=file)
    draw(pipe, SD3)
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, SD3), state_of(SD3.build(), SD3))
    with_norm = tmp_path / "b.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, values in head_tensors(SD3, GM, with_norm=True).items():
        tensors[f"policy.{name}"] = values
    safetensors.torch.save_file(tensors, with_norm)
    with pytest.raises(PipelineError, match="a LoRA is on the output layers of SD3Transformer2D"):
        wrapped(SD3, adapter=with_norm, recipe=policy_recipe(SD3, GM))


def test_a_batch_is_its_pictures_one_by_one(tmp_path: Path) -> None:
    pipe: Any = wrapped(FLUX, adapter=policy_file(FLUX, tmp_path / "a.safetensors", GM))
    both = pipe(**FLUX.arguments(2), seed=[0, 7])[0]
    torch.testing.assert_close(both[:1], draw(pipe, FLUX), atol=1e-5, rtol=1e-5)


@POLICIES
@FAMILIES
def test_the_picture_is_decoded(family: TinyFamily, policy: StepPolicy, tmp_path: Path) -> None:
    pipe = wrapped(family, adapter=policy_file(family, tmp_path / "a.safetensors", policy))
    drawn = draw(pipe, family, output_type="pt")
    assert drawn.shape == (1, 3, 32, 32)
    assert bool(drawn.isfinite().all())


def test_the_adapters_scale_is_the_loras(tmp_path: Path) -> None:
    head = head_tensors(SD3, GM)
    file = policy_file(SD3, tmp_path / "a.safetensors", GM, head=head)
    halved = policy_recipe(SD3, GM, lora=Lora(scale=0.5))
    half = policy_file(SD3, tmp_path / "b.safetensors", GM, head=head, recipe=halved)
    expected = draw(wrapped(SD3, adapter=half), SD3)
    drawn = draw(wrapped(SD3, adapter=file, adapter_scale=0.5), SD3)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


def test_callbacks_see_samples_and_may_change_them(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=policy_file(SD3, tmp_path / "a.safetensors", GM))
    shapes = []

    def seen(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append(tuple(kwargs["latents"].shape))
        return {"latents": 0.0 * kwargs["latents"]} if index == 3 else {}

    drawn = draw(pipe, SD3, callback_on_step_end=seen)
    assert shapes == [(1, 4, 16, 16)] * 4
    assert float(drawn.abs().max()) == 0.0


@POLICIES
@pytest.mark.parametrize("rule", ["snap", "insert"])
def test_image_to_image_follows_the_policy_from_its_start(
    rule: str, policy: StepPolicy, tmp_path: Path
) -> None:
    """Where every component is the stock answer, the picture is the stock one, whatever step."""
    head = stock_head(SD3, policy)
    pipe = wrapped(SD3, adapter=policy_file(SD3, tmp_path / "a.safetensors", policy, head=head))
    plain = wrapped(SD3, adapter=plain_file(SD3, tmp_path / "b.safetensors"))
    pictures = []
    for one in (pipe, plain):
        other: Any = FewStepPipeline.wrap(stock.StableDiffusion3Img2ImgPipeline.from_pipe(one))
        other.set_progress_bar_config(disable=True)
        arguments = {k: v for k, v in SD3.arguments(1).items() if k not in ("height", "width")}
        image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
        told = {"strength": 0.7, "strength_rule": rule, "seed": 0}
        pictures.append(other(**arguments, image=image, **told)[0])
        one.unwrap()
        other.unwrap()
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=1e-5)
    assert_bits_equal(state_of(pipe, SD3), state_of(SD3.build(), SD3))


def test_a_copy_of_the_pipeline_has_a_head_of_its_own(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=policy_file(SD3, tmp_path / "a.safetensors", GM))
    expected = draw(pipe, SD3)
    twin = copy.deepcopy(pipe)
    pipe.unwrap()
    torch.testing.assert_close(draw(twin, SD3), expected)
    twin.unwrap()
    assert_bits_equal(state_of(twin, SD3), state_of(SD3.build(), SD3))


def test_one_graph_serves_all_steps_of_a_compiled_network(tmp_path: Path) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe: Any = wrapped(SD3, adapter=policy_file(SD3, tmp_path / "a.safetensors", GM))
    expected = draw(pipe, SD3)
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    torch.testing.assert_close(draw(pipe, SD3), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_half_precision_network_keeps_its_head_in_float32(tmp_path: Path) -> None:
    pipe = SD3.build().to(dtype=torch.bfloat16)
    file = policy_file(SD3, tmp_path / "a.safetensors", GM)
    made: Any = FewStepPipeline.wrap(pipe, adapter=file)
    made.set_progress_bar_config(disable=True)
    model: Any = denoiser(made, SD3)
    assert model.norm_out.head.means.weight.dtype is torch.float32
    arguments = {
        name: value.bfloat16() if isinstance(value, Tensor) else value
        for name, value in SD3.arguments(1).items()
    }
    half = made(**arguments, seed=0)[0].float()
    full = draw(wrapped(SD3, adapter=file), SD3)
    assert float((half - full).norm() / full.norm()) < 0.05
    made.unwrap()
    assert model.proj_out.weight.dtype is torch.bfloat16


@pytest.mark.parametrize("offload", [offload_models, offload_leaves, offload_blocks])
@pytest.mark.parametrize("is_first", [True, False], ids=["offload then wrap", "wrap then offload"])
def test_offloading_moves_the_head_with_the_network(
    offload: Callable[[Any], None], is_first: bool, tmp_path: Path
) -> None:
    file = policy_file(SD3, tmp_path / "a.safetensors", GM)
    expected = draw(wrapped(SD3, adapter=file), SD3)
    stock_pipe: Any = SD3.build()
    if is_first:
        offload(stock_pipe)
    before = hooks_on(stock_pipe, SD3)
    pipe = FewStepPipeline.wrap(stock_pipe, adapter=file)
    pipe.set_progress_bar_config(disable=True)
    if not is_first:
        offload(pipe)
    assert torch.equal(draw(pipe, SD3), expected)
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, SD3), state_of(SD3.build(), SD3))
    if is_first:
        assert hooks_on(pipe, SD3) == before


# --- files


@pytest.mark.parametrize("family", [SD3, FLUX], ids=lambda family: family.name)
def test_the_file_says_what_it_is(family: TinyFamily, tmp_path: Path) -> None:
    head = head_tensors(family, GM, with_norm=True)
    file = policy_file(family, tmp_path / "a.safetensors", GM, head=head, dtype="bf16")
    parts = adapter_parts(read_header(file))
    assert (parts.kind, set(parts.policy)) == ("policy", set(head))
    assert parts.policy["means.weight"] == "policy.means.weight"
    stored = safetensors.torch.load_file(file)
    assert all(torch.equal(stored[f"policy.{name}"], values) for name, values in head.items())
    report = inspect_adapter(file, values=True)
    assert report.kind_text == "LoRA with a policy head (a wider output layer)"
    assert report.errors == ()
    assert any("only FewStepPipeline applies this kind" in text for text in report.warnings)
    assert read_header(file).metadata["fewstep.needs"].startswith("LoRA with a policy head")
    assert read_header(file).recipe() == policy_recipe(family, GM, lora=Lora(alpha="baked"))
    again = policy_file(family, tmp_path / "b.safetensors", GM, head=head, dtype="bf16")
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_authors_own_layout_draws_the_same_picture(prefix: str, tmp_path: Path) -> None:
    head = head_tensors(FLUX, GM, with_norm=True)
    expected = draw(
        wrapped(FLUX, adapter=policy_file(FLUX, tmp_path / "a.safetensors", GM, head=head)), FLUX
    )
    theirs = tmp_path / "theirs.safetensors"
    tensors = {**lora_tensors(FLUX, 1), **authors_names(head)}
    safetensors.torch.save_file({f"{prefix}{n}": t for n, t in tensors.items()}, theirs)
    assert adapter_parts(read_header(theirs)).kind == "policy"
    pipe = wrapped(FLUX, adapter=theirs, recipe=policy_recipe(FLUX, GM))
    torch.testing.assert_close(draw(pipe, FLUX), expected, atol=1e-5, rtol=1e-5)


def dx_of_the_authors(path: Path, **config: object) -> Path:
    head = head_tensors(FLUX, DX)
    tensors = {
        **lora_tensors(FLUX, 1),
        "proj_out.weight": head["means.weight"],
        "proj_out.bias": head["means.bias"],
    }
    policy = json.dumps({"type": "DX", "shift": 5.0, "segment_size": 0.25, **config})
    safetensors.torch.save_file(tensors, path, {"policy_config": policy} if config else None)
    return path


def test_their_dx_files_are_known_by_their_metadata_alone(tmp_path: Path) -> None:
    recipe = policy_recipe(FLUX, DX)
    expected = draw(wrapped(FLUX, adapter=policy_file(FLUX, tmp_path / "a.safetensors", DX)), FLUX)
    theirs = dx_of_the_authors(tmp_path / "dx.safetensors", mode="grid")
    drawn = draw(wrapped(FLUX, adapter=theirs, recipe=recipe), FLUX)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    odd = dx_of_the_authors(tmp_path / "p.safetensors", mode="polynomial")
    with pytest.raises(AdapterError, match="its policy is a polynomial in time, which no recipe"):
        wrapped(FLUX, adapter=odd, recipe=recipe)
    assert adapter_parts(read_header(dx_of_the_authors(tmp_path / "x.safetensors"))).policy == {}


@pytest.mark.parametrize("flavour", ["comfyui", "kohya"])
def test_no_other_program_has_names_for_a_head(flavour: Any, tmp_path: Path) -> None:
    file = policy_file(SD3, tmp_path / "a.safetensors", GM)
    with pytest.raises(AdapterError, match="LoRA with a policy head .*, which no program of the"):
        convert_file(file, tmp_path / "b.safetensors", flavour)


def test_converting_keeps_the_head_and_gives_the_authors_file_a_recipe(tmp_path: Path) -> None:
    head, recipe = head_tensors(FLUX, GM, with_norm=True), policy_recipe(FLUX, GM)
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    safetensors.torch.save_file({**lora_tensors(FLUX, 1), **authors_names(head)}, theirs)
    done = convert_file(theirs, ours, "diffusers", family="flux", recipe=recipe)
    assert done.modules == len(lora_tensors(FLUX, 1)) // 2
    stored = safetensors.torch.load_file(ours)
    assert all(torch.equal(stored[f"policy.{name}"], values) for name, values in head.items())
    assert read_header(ours).metadata["fewstep.needs"].startswith("LoRA with a policy head")
    expected = draw(wrapped(FLUX, adapter=theirs, recipe=recipe), FLUX)
    torch.testing.assert_close(draw(wrapped(FLUX, adapter=ours), FLUX), expected)
    again = tmp_path / "again.safetensors"
    convert_file(ours, again, "diffusers", family="flux")
    assert_bits_equal(safetensors.torch.load_file(again), stored)


@POLICIES
def test_the_flux_loader_leaves_the_head_out_which_the_doctor_says(
    policy: StepPolicy, tmp_path: Path
) -> None:
    file = policy_file(FLUX, tmp_path / "a.safetensors", policy)
    assert try_stock_load(FLUX.build(), read_header(file)) == StockLoad(4)
    codes = {finding.code for finding in examine_adapter(file).findings}
    assert codes == {"adapter/not-plain-lora", "comfyui/no-sampler"}
    for family in (SD3, QWEN_IMAGE):
        other = policy_file(family, tmp_path / "b.safetensors", policy)
        loaded = try_stock_load(family.build(), read_header(other))
        assert loaded is not None
        assert loaded.error is not None


# --- refusals


def test_file_and_recipe_must_both_know_of_the_policy(tmp_path: Path) -> None:
    headed = policy_file(SD3, tmp_path / "a.safetensors", GM)
    plain = expert_file(SD3, tmp_path / "b.safetensors", seed=1)
    with pytest.raises(AdapterError, match="holds a policy head, .* sampler.kind is 'step'"):
        wrapped(SD3, adapter=headed, recipe=SD3.recipe())
    with pytest.raises(AdapterError, match="holds no policy head, but .* sampler is 'policy'"):
        wrapped(SD3, adapter=plain, recipe=policy_recipe(SD3, GM))
    with pytest.raises(PipelineError, match="'policy', .* no adapter with a policy head"):
        wrapped(SD3, recipe=policy_recipe(SD3, GM))
    with pytest.raises(
        AdapterError,
        match="is a mixture, but the recipe's sampler.policy.kind is",
    ):
        wrapped(SD3, adapter=headed, recipe=policy_recipe(SD3, DX))
    with pytest.raises(AdapterError, match="goes from 16 to 12 values, but 5 components"):
        wrapped(SD3, adapter=headed, recipe=policy_recipe(SD3, replace(GM, components=5)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy.means.bias": None}, r"has means.weight \(out, in\) and means.bias \(out,\)"),
        ({"policy.logstds.0.weight": None}, "'logstds.0.bias' has no place in a policy head"),
        ({"policy.logstds.1.bias": None}, "has logstds.1.weight"),
        ({"policy.more.weight": torch.zeros(2)}, "'more.weight' has no place in a policy head"),
        ({"policy.logstd": torch.zeros(1)}, "or by the number logstd, got both"),
        ({"policy.means.weight": torch.zeros(12, 8)}, "wanted 8 and any"),
        ({"policy.logweights.weight": torch.zeros(4, 16)}, "logweights"),
    ],
)
def test_a_head_that_is_none_is_refused_and_nothing_is_left(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = policy_file(SD3, tmp_path / "a.safetensors", GM)
    tensors = {**safetensors.torch.load_file(file), **change}
    kept = {name: values for name, values in tensors.items() if values is not None}
    safetensors.torch.save_file(kept, file)
    pipe = SD3.build()
    with pytest.raises(AdapterError, match=said):
        FewStepPipeline.wrap(pipe, adapter=file, recipe=policy_recipe(SD3, GM))
    assert_bits_equal(state_of(pipe, SD3), state_of(SD3.build(), SD3))


def test_log_weights_must_be_the_same_for_each_pixel(tmp_path: Path) -> None:
    head = head_tensors(FLUX, GM)
    for name in ("weight", "bias"):
        head[f"logweights.{name}"] = head[f"logweights.{name}"][:9]
    file = policy_file(FLUX, tmp_path / "a.safetensors", GM, head=head)
    with pytest.raises(AdapterError, match="gives 9 log weights for 3 components of 4 channels"):
        wrapped(FLUX, adapter=file)


def test_networks_without_a_place_are_refused(tmp_path: Path) -> None:
    file = policy_file(SD3, tmp_path / "a.safetensors", GM)
    tensors = safetensors.torch.load_file(file)
    kept = {name: values for name, values in tensors.items() if name.startswith("policy.")}
    lora = {f"transformer.{name}": values for name, values in lora_tensors(WAN21, 1).items()}
    safetensors.torch.save_file({**kept, **lora}, file)
    pipe = WAN21.build()
    with pytest.raises(PipelineError, match="WanTransformer3DModel has no place for; hosts are"):
        FewStepPipeline.wrap(pipe, adapter=file, recipe=policy_recipe(WAN21, GM))
    assert_bits_equal(state_of(pipe, WAN21), state_of(WAN21.build(), WAN21))


def test_a_layer_that_carries_another_lora_is_not_replaced(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe: Any = SD3.build()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out"]), "style")
    file = policy_file(SD3, tmp_path / "a.safetensors", GM)
    with pytest.raises(PipelineError, match="a LoRA is on the output layers"):
        FewStepPipeline.wrap(pipe, adapter=file)


def test_neither_fused_nor_saved_nor_refined(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=policy_file(SD3, tmp_path / "a.safetensors", GM))
    with pytest.raises(PipelineError, match=r'cannot be fused; experts="fused" merges the LoRA'):
        pipe.fuse()
    with pytest.raises(PipelineError, match="has a policy head, .* no diffusers folder can hold"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(PipelineError, match="is of kind 'policy'"):
        draw(pipe, SD3, teacher_refine=TeacherRefine())


def test_two_answers_are_not_mixed(tmp_path: Path) -> None:
    for family, name in ((SD3, "guidance_scale"), (FLUX, "true_cfg_scale")):
        pipe = wrapped(family, adapter=policy_file(family, tmp_path / "a.safetensors", GM))
        with (
            pytest.warns(UserWarning, match="was made for"),
            pytest.raises(PipelineError, match=f"{name}=4 mixes two answers .* cannot be mixed"),
        ):
            draw(pipe, family, **{name: 4.0})


def test_a_head_that_was_taken_off_is_noticed(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=policy_file(SD3, tmp_path / "a.safetensors", GM))
    model: Any = denoiser(pipe, SD3)
    model.norm_out = model.norm_out.stock
    with pytest.raises(PipelineError, match="is no longer on transformer; unwrap"):
        draw(pipe, SD3)


def test_no_stock_scheduler_stands_in() -> None:
    stand_in = stock_scheduler("StableDiffusion3Pipeline", policy_recipe(SD3, GM), 4)
    assert stand_in.scheduler is None
    assert stand_in.deviations == ("the sampler is a policy, which no stock scheduler does",)


def test_modular_pipelines_point_to_the_classic_one(tmp_path: Path) -> None:
    file = policy_file(FLUX, tmp_path / "a.safetensors", GM)
    with pytest.raises(PipelineError, match="is a policy with a head, which modular pipelines"):
        FewStepModularPipeline.wrap(modular(FLUX), adapter=file)


def test_the_writer_refuses_what_the_recipe_does_not_say(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    with pytest.raises(AdapterError, match="by sampler.kind 'policy', but the recipe says 'step'"):
        policy_file(SD3, target, GM, recipe=SD3.recipe())
    with pytest.raises(AdapterError, match="policy is 'dx' with 3 components, but this head is a"):
        policy_file(SD3, target, GM, recipe=policy_recipe(SD3, DX))
    with pytest.raises(AdapterError, match="and its means have 12 outputs; correct the recipe"):
        policy_file(SD3, target, GM, recipe=policy_recipe(SD3, replace(GM, components=5)))
    with pytest.raises(AdapterError, match="a policy head has means.weight, .* got "):
        policy_file(SD3, target, GM, head={"logstd": torch.zeros(1)})
    with pytest.raises(AdapterError, match="got .*'more.weight'"):
        policy_file(SD3, target, GM, head={**head_tensors(SD3, GM), "more.weight": torch.ones(1)})
    assert not target.exists()
