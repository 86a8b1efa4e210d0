"""LoRaD: rotations of weight columns, as arithmetic, as a file, and on pipelines."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fewstep.adapters import adapter_parts, inspect_adapter, read_header, save_lorad_adapter
from fewstep.adapters.conversion.convert import convert_file
from fewstep.adapters.header import AdapterHeader, TensorInfo
from fewstep.adapters.kinds import check_rotations
from fewstep.doctor.adapter_file import examine_adapter
from fewstep.errors import AdapterError, PipelineError, ShapeError
from fewstep.heads.lorad import merged, rotate
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.modular import FewStepModularPipeline
from fewstep.pipeline.teacher_refine import TeacherRefine
from fewstep.recipe import METADATA_KEY, FewStepRecipe, Lora
from tests.expert_files import (
    assert_same_picture,
    deltas_of,
    draw,
    draw_by_hand,
    expert_file,
    expert_recipe,
)
from tests.head_files import (
    assert_bits_equal,
    denoiser,
    lorad_file,
    lorad_recipe,
    lorad_tensors,
    rotate_by_hand,
    rotated_by_hand,
    state_of,
    wrapped,
)
from tests.test_pipeline_modular import modular
from tests.tiny_pipelines import FLUX, PIXART, QWEN_IMAGE, SD3, SD15, WAN21, WAN22, TinyFamily

POLICIES = pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
FAMILIES = pytest.mark.parametrize(
    "family", [SD15, SD3, FLUX, PIXART, QWEN_IMAGE, WAN21], ids=lambda family: family.name
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- arithmetic


def test_angles_of_zero_are_the_weight_itself_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        weight = normal(5, 8).to(dtype)
        turned = rotate(weight, torch.zeros(5, 4))
        assert turned.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(turned, weight.to(turned.dtype))
        assert torch.equal(merged(weight, torch.zeros(5, 2), normal(2, 4)), weight)


def test_norms_of_pairs_and_rows_stay() -> None:
    weight, angles = normal(7, 10, dtype=torch.float64), 9.0 * normal(7, 5, seed=1).double()
    turned = rotate(weight, angles)
    pairs, before = (w.unflatten(1, (-1, 2)).norm(dim=2) for w in (turned, weight))
    torch.testing.assert_close(pairs, before, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(turned.norm(dim=1), weight.norm(dim=1), rtol=1e-14, atol=0.0)
    assert not torch.allclose(turned, weight, atol=0.1)


def test_a_quarter_turn_moves_the_first_column_of_a_pair_onto_the_second() -> None:
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), torch.full((1, 2), math.pi / 2))
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0, -2.0, 0.0]]))


def test_angles_count_modulo_a_turn_and_add_up() -> None:
    weight, one, two = normal(4, 6).double(), normal(4, 3, seed=1).double(), normal(4, 3, seed=2)
    torch.testing.assert_close(rotate(weight, one), rotate(weight, one + 2.0 * math.pi))
    torch.testing.assert_close(rotate(rotate(weight, one), two), rotate(weight, one + two))
    torch.testing.assert_close(rotate(rotate(weight, one), -one), weight)


def test_gradients_of_weight_and_angles_are_those_of_finite_differences() -> None:
    weight = normal(3, 4, dtype=torch.float64).requires_grad_()
    angles = normal(3, 2, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rotate, (weight, angles))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_is_the_rotation_one_number_at_a_time(dtype: torch.dtype) -> None:
    weight, a, b = normal(6, 8).to(dtype), normal(6, 3, seed=1), normal(3, 4, seed=2)
    found = merged(weight, a, b)
    assert found.dtype == dtype
    by_hand = rotated_by_hand(weight.double(), a, b)
    torch.testing.assert_close(found.double(), by_hand, rtol=4 * torch.finfo(dtype).eps, atol=2e-6)
    half = rotated_by_hand(weight.double(), 0.5 * a, b)
    torch.testing.assert_close(merged(weight.float(), a, b, 0.5).double(), half, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("weight", "angles"),
    [((4, 5), (4, 2)), ((4, 6), (4, 2)), ((4, 6), (3, 3)), ((4, 6, 1), (4, 3))],
)
def test_shapes_that_make_no_pairs_are_refused(weight: Any, angles: Any) -> None:
    with pytest.raises(ShapeError, match=r"a rotation needs a weight \(out, in\) with in even"):
        rotate(torch.zeros(weight), torch.zeros(angles))


# --- the file


def test_the_file_holds_the_angles_and_names_its_kind(tmp_path: Path) -> None:
    tensors = lorad_tensors(SD3, 1)
    file = lorad_file(SD3, tmp_path / "a.safetensors", tensors=tensors)
    found = safetensors.torch.load_file(file)
    assert_bits_equal(found, {f"transformer.{name}": t for name, t in tensors.items()})
    header = read_header(file)
    recipe = header.recipe()
    assert recipe is not None
    assert recipe == lorad_recipe(SD3)
    assert adapter_parts(header).kind == "lorad"
    assert "only FewStepPipeline of fewstep applies" in header.metadata["fewstep.needs"]
    again = lorad_file(SD3, tmp_path / "b.safetensors", tensors=tensors)
    assert again.read_bytes() == file.read_bytes()


def test_the_recipes_scale_is_multiplied_into_the_angles(tmp_path: Path) -> None:
    tensors = lorad_tensors(SD3, 1)
    recipe = SD3.recipe(lora=Lora(scale=0.25))
    file = lorad_file(SD3, tmp_path / "a.safetensors", recipe=recipe, tensors=tensors)
    for name, values in safetensors.torch.load_file(file).items():
        plain = tensors[name.removeprefix("transformer.")]
        assert torch.equal(values, 0.25 * plain if "lorad_A" in name else plain)
    assert read_header(file).recipe() == lorad_recipe(SD3)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "needs at least one module"),
        ({"x.lora_A.weight": torch.zeros(4, 2)}, "is no name of a rotation"),
        ({"unet.x.lorad_A.weight": torch.zeros(4, 2)}, "is no name of a rotation"),
        ({"x.lorad_A.weight": torch.zeros(4, 2)}, r"lorad_A \[4, 2\] and lorad_B None"),
        (
            {"x.lorad_A.weight": torch.zeros(4, 2), "x.lorad_B.weight": torch.zeros(3, 4)},
            r"lorad_A \[4, 2\] and lorad_B \[3, 4\]; wanted \(out, rank\)",
        ),
        (
            {
                "x.lorad_A.weight": torch.full((4, 2), math.nan),
                "x.lorad_B.weight": torch.ones(2, 4),
            },
            "not finite",
        ),
    ],
)
def test_what_makes_no_rotation_is_not_written(tensors: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=said):
        save_lorad_adapter(
            tmp_path / "a.safetensors", tensors, recipe=SD3.recipe(), title="a", metadata={}
        )
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_the_kind_and_the_coverage(tmp_path: Path) -> None:
    file = lorad_file(SD3, tmp_path / "a.safetensors")
    base = tmp_path / "base"
    SD3.build().save_pretrained(base)
    report = inspect_adapter(file, base)
    assert report.kind == "lorad"
    assert "kind      LoRaD (rotations of weight columns)" in report.to_text()
    assert report.num_modules == 2
    assert [(row.rank, row.modules) for row in report.ranks] == [(2, 2)]
    assert report.errors == ()
    assert report.coverage is not None
    assert report.coverage.matched == 2
    assert any("only FewStepPipeline applies this kind" in text for text in report.warnings)
    other = inspect_adapter(lorad_file(SD15, tmp_path / "b.safetensors"), base)
    assert "none of 16 rotated modules fit this base" in (other.coverage_error or "")


def test_the_doctor_says_that_other_programs_cannot_apply_it(tmp_path: Path) -> None:
    found = examine_adapter(lorad_file(SD3, tmp_path / "a.safetensors")).findings
    assert [finding.code for finding in found] == ["adapter/not-plain-lora"]
    assert "fewstep convert --base BASE --rank R" in found[0].fix


@pytest.mark.parametrize("family", [SD15, SD3, FLUX, WAN21], ids=lambda family: family.name)
def test_stock_diffusers_refuses_the_file(family: TinyFamily, tmp_path: Path) -> None:
    file = lorad_file(family, tmp_path / "a.safetensors")
    stock: Any = family.build()
    with pytest.raises(IndexError):  # not a sentence, but no picture either
        stock.load_lora_weights(str(tmp_path), weight_name=file.name)


# --- on pipelines


@POLICIES
@FAMILIES
def test_the_picture_is_that_of_weights_rotated_by_hand(
    family: TinyFamily, policy: str, tmp_path: Path
) -> None:
    tensors = lorad_tensors(family, 1)
    file = lorad_file(family, tmp_path / "a.safetensors", tensors=tensors)
    stock = family.build()
    rotate_by_hand(denoiser(stock, family), tensors)
    expected = draw(FewStepPipeline.wrap(stock, recipe=family.recipe()), family)
    pipe = wrapped(family, adapter=file, experts=policy)
    before = state_of(family.build(), family)
    assert_same_picture(draw(pipe, family), expected)
    plain = draw(wrapped(family, recipe=family.recipe()), family)
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert "a.safetensors at scale 1" in pipe.describe()
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, family), before)


@POLICIES
def test_the_adapters_scale_multiplies_the_angles(policy: str, tmp_path: Path) -> None:
    tensors = lorad_tensors(SD3, 1)
    file = lorad_file(SD3, tmp_path / "a.safetensors", tensors=tensors)
    stock = SD3.build()
    halved = {n: 0.5 * t if "lorad_A" in n else t for n, t in tensors.items()}
    rotate_by_hand(denoiser(stock, SD3), halved)
    expected = draw(FewStepPipeline.wrap(stock, recipe=SD3.recipe()), SD3)
    pipe = wrapped(SD3, adapter=file, adapter_scale=0.5, experts=policy)
    assert_same_picture(draw(pipe, SD3), expected)
    off = wrapped(SD3, adapter=file, adapter_scale=0.0, experts=policy)
    assert torch.equal(draw(off, SD3), draw(wrapped(SD3, recipe=SD3.recipe()), SD3))


def test_a_half_precision_base_comes_back_bit_for_bit(tmp_path: Path) -> None:
    file = lorad_file(SD3, tmp_path / "a.safetensors")
    stock = SD3.build().to(torch.bfloat16)
    before = state_of(stock, SD3)
    pipe = FewStepPipeline.wrap(stock, adapter=file)
    name = "transformer_blocks.0.attn.to_q.weight"
    rotated = dict(denoiser(pipe, SD3).named_parameters())[name]
    assert rotated.dtype == torch.bfloat16
    assert not torch.equal(rotated, before[name])
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, SD3), before)


@POLICIES
def test_a_style_lora_on_top_adds_to_the_rotated_weights(policy: str, tmp_path: Path) -> None:
    file = lorad_file(SD3, tmp_path / "a.safetensors")
    style = expert_file(SD3, tmp_path / "style.safetensors", seed=3)
    stock = SD3.build()
    rotate_by_hand(denoiser(stock, SD3), lorad_tensors(SD3, 1))
    pipe: Any = FewStepPipeline.wrap(stock, recipe=SD3.recipe())
    weights = denoiser(pipe, SD3).state_dict()
    for name, delta in deltas_of(style, "transformer")["transformer"].items():
        weights[name] += delta
    expected = draw(pipe, SD3)
    ours: Any = wrapped(SD3, adapter=file, experts=policy)
    ours.load_lora_weights(str(style), adapter_name="style")
    assert_same_picture(draw(ours, SD3), expected)
    ours.fuse_lora()
    with pytest.raises(PipelineError, match="call unfuse_lora\\(\\) first"):
        ours.unwrap()
    ours.unfuse_lora()
    ours.unload_lora_weights()
    ours.unwrap()
    assert_bits_equal(state_of(ours, SD3), state_of(SD3.build(), SD3))


@POLICIES
def test_phase_experts_may_rotate_in_turn(policy: str, tmp_path: Path) -> None:
    recipe = expert_recipe(SD3, lora=Lora(alpha="baked", kind="lorad"))
    files, deltas = {}, {}
    weights = state_of(SD3.build(), SD3)
    for expert, seed in (("high_noise", 1), ("low_noise", 2)):
        tensors = lorad_tensors(SD3, seed)
        files[expert] = lorad_file(
            SD3, tmp_path / f"{expert}.safetensors", tensors=tensors, recipe=recipe
        )
        stock = SD3.build()
        rotate_by_hand(denoiser(stock, SD3), tensors)
        turned = state_of(stock, SD3)
        deltas[expert] = {"transformer": {n: turned[n] - weights[n] for n in weights}}
    order = ["high_noise", "high_noise", "low_noise", "low_noise"]
    expected = draw_by_hand(SD3, recipe, [[deltas[expert]] for expert in order])
    pipe = wrapped(SD3, adapter=files, experts=policy)
    assert_same_picture(draw(pipe, SD3), expected)
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, SD3), weights)


@POLICIES
def test_one_file_may_rotate_both_networks(policy: str, tmp_path: Path) -> None:
    recipe = expert_recipe(WAN22, own_networks=True, lora=Lora(alpha="baked", kind="lorad"))
    stock, tensors = WAN22.build(), {}
    for seed, component in enumerate(WAN22.denoisers):
        mine = lorad_tensors(WAN22, seed)
        rotate_by_hand(stock.components[component], mine)
        tensors |= {f"{component}.{name}": t for name, t in mine.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    expected = draw(FewStepPipeline.wrap(stock, recipe=recipe), WAN22)
    pipe = wrapped(WAN22, adapter=tmp_path / "a.safetensors", recipe=recipe, experts=policy)
    assert_same_picture(draw(pipe, WAN22), expected)


def test_a_modular_pipeline_rotates_too(tmp_path: Path) -> None:
    file = lorad_file(FLUX, tmp_path / "a.safetensors")
    pipe = FewStepModularPipeline.wrap(modular(FLUX), adapter=file)
    model = pipe.components["transformer"]
    expected = denoiser(FLUX.build(), FLUX)
    rotate_by_hand(expected, lorad_tensors(FLUX, 1))
    name = "transformer_blocks.0.attn.to_q.weight"
    torch.testing.assert_close(model.state_dict()[name], expected.state_dict()[name])
    pipe.unwrap()
    assert_bits_equal(model.state_dict(), state_of(FLUX.build(), FLUX))


def test_fused_and_saved_the_folder_draws_the_same(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=lorad_file(SD3, tmp_path / "a.safetensors")).fuse()
    expected = draw(pipe, SD3)
    pipe.save_pretrained(tmp_path / "saved")
    again = FewStepPipeline.from_pretrained(tmp_path / "saved")
    assert_same_picture(draw(again, SD3), expected)


# --- refusals


Q = "transformer_blocks.0.attn.to_q"


def strange(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {
        "x.y.lorad_A.weight": torch.ones(4, 2),
        "x.y.lorad_B.weight": torch.ones(2, 4),
    }


def too_long(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    a = tensors[f"{Q}.lorad_A.weight"]
    return tensors | {f"{Q}.lorad_A.weight": torch.cat([a, a])}


def on_a_convolution(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(Q, "pos_embed.proj"): t for name, t in tensors.items()}


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name != f"{Q}.lorad_B.weight"}


def mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"z.lora_A.weight": torch.ones(2, 4), "z.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (strange, "only 2 of 3 rotated modules fit .*: 'x.y' is not in the base"),
        (too_long, r"to_q' has A \[32, 2\] and B \[2, 8\], the base weight is \[16, 16\]"),
        (on_a_convolution, "pos_embed.proj' is no linear layer"),
        (halved, "has no B of its rotation"),
        (mixed, "mixes rotations .* with other tensors"),
    ],
)
@POLICIES
def test_a_file_that_does_not_fit_is_refused_and_nothing_changes(
    policy: str, change: Any, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    tensors = change(lorad_tensors(SD3, 1))
    safetensors.torch.save_file({f"transformer.{n}": t for n, t in tensors.items()}, file)
    stock = SD3.build()
    with pytest.raises(AdapterError, match=said):
        FewStepPipeline.wrap(stock, adapter=file, recipe=lorad_recipe(SD3), experts=policy)
    assert_bits_equal(state_of(stock, SD3), state_of(SD3.build(), SD3))


def test_an_odd_number_of_inputs_is_refused() -> None:
    infos = {
        "x.lorad_A.weight": TensorInfo("F32", (4, 2), 0, 32),
        "x.lorad_B.weight": TensorInfo("F32", (2, 2), 32, 16),
    }
    header = AdapterHeader(Path("a.safetensors"), 48, {}, infos)
    rotations = adapter_parts(header).rotations
    check_rotations(header, rotations, {"x.weight": (4, 4)})
    with pytest.raises(AdapterError, match=r"has an odd number of inputs \(5\)"):
        check_rotations(header, rotations, {"x.weight": (4, 5)})


def test_file_and_recipe_must_name_the_same_kind(tmp_path: Path) -> None:
    rotations = lorad_file(SD3, tmp_path / "a.safetensors")
    plain = expert_file(SD3, tmp_path / "b.safetensors", seed=1)
    with pytest.raises(AdapterError, match="'lorad' tensors, but the recipe's lora.kind is 'lora'"):
        wrapped(SD3, adapter=rotations, recipe=SD3.recipe())
    with pytest.raises(AdapterError, match="'lora' tensors, but the recipe's lora.kind is 'lorad'"):
        wrapped(SD3, adapter=plain, recipe=lorad_recipe(SD3))


def test_a_quantised_weight_is_refused(tmp_path: Path) -> None:
    file = lorad_file(SD3, tmp_path / "a.safetensors")
    stock = SD3.build()
    layer = denoiser(stock, SD3).get_submodule("transformer_blocks.0.attn.to_q")
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)  # pyright: ignore
    with pytest.raises(PipelineError, match="is quantised .* so it cannot be rotated"):
        FewStepPipeline.wrap(stock, adapter=file)


def test_a_teacher_cannot_be_had_by_switching_rotations_off(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=lorad_file(SD3, tmp_path / "a.safetensors"))
    with pytest.raises(PipelineError, match="a.safetensors is of kind 'lorad'"):
        draw(pipe, SD3, teacher_refine=TeacherRefine())


# --- as a plain LoRA


@pytest.fixture
def base(tmp_path: Path) -> Path:
    SD3.build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_at_full_rank_the_lora_made_of_it_draws_the_same_in_stock_diffusers(
    base: Path, tmp_path: Path
) -> None:
    file = lorad_file(SD3, tmp_path / "a.safetensors")
    done = convert_file(file, tmp_path / "lora.safetensors", "diffusers", base=base, rank=16)
    assert done.modules == 2
    assert done.to_dict()["relative_error"] < 1e-5
    recipe = read_header(done.path).recipe()
    assert recipe is not None
    assert recipe == replace(lorad_recipe(SD3), lora=Lora(alpha="baked"))
    assert "fewstep.needs" not in read_header(done.path).metadata
    expected = draw(wrapped(SD3, adapter=file), SD3)
    assert_same_picture(draw(wrapped(SD3, adapter=done.path), SD3), expected)
    stock: Any = SD3.build()
    stock.load_lora_weights(str(done.path))
    assert_same_picture(draw(FewStepPipeline.wrap(stock, recipe=SD3.recipe()), SD3), expected)


@pytest.mark.parametrize("flavour", ["diffusers", "comfyui", "kohya"])
def test_a_smaller_rank_costs_the_tail_of_the_singular_values(
    flavour: Any, base: Path, tmp_path: Path
) -> None:
    tensors = lorad_tensors(SD3, 1)
    file = lorad_file(SD3, tmp_path / "a.safetensors", tensors=tensors)
    done = convert_file(file, tmp_path / "lora.safetensors", flavour, base=base, rank=3)
    tail, whole = 0.0, 0.0
    for name, weight in denoiser(SD3.build(), SD3).state_dict().items():
        module = name.removesuffix(".weight")
        if f"{module}.lorad_A.weight" in tensors:
            a, b = (tensors[f"{module}.lorad_{end}.weight"] for end in "AB")
            values = torch.linalg.svdvals(rotated_by_hand(weight, a, b) - weight)
            tail += float(values[3:].square().sum())
            whole += float(values.square().sum())
    assert done.to_dict()["relative_error"] == pytest.approx(math.sqrt(tail / whole), rel=1e-4)


def test_without_a_base_or_a_rank_there_is_no_lora(base: Path, tmp_path: Path) -> None:
    file = lorad_file(SD3, tmp_path / "a.safetensors")
    incomplete: list[dict[str, Any]] = [{}, {"base": base}, {"rank": 4}]
    for options in incomplete:
        with pytest.raises(AdapterError, match="holds rotations .* give --base, .* and --rank"):
            convert_file(file, tmp_path / "lora.safetensors", "diffusers", **options)


# --- recipes


def test_a_recipe_that_names_no_kind_is_one_of_loras_and_stays_as_it_was_written() -> None:
    recipe = SD3.recipe()
    assert '"kind": "lora"' not in recipe.to_json()
    assert FewStepRecipe.from_json(recipe.to_json()).lora.kind == "lora"
    rotated = lorad_recipe(SD3)
    assert '"kind": "lorad"' in rotated.to_json()
    assert FewStepRecipe.from_json(rotated.to_json()) == rotated


def test_the_stored_recipe_is_the_files_word(tmp_path: Path) -> None:
    file = lorad_file(SD3, tmp_path / "a.safetensors")
    assert '"kind": "lorad"' in read_header(file).metadata[METADATA_KEY]
    assert wrapped(SD3, adapter=file).recipe.lora.kind == "lorad"
