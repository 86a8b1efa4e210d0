"""Routes: several students in one file, each for the prompts nearest to its centroid."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fewstep.adapters import (
    RouteWeights,
    adapter_parts,
    inspect_adapter,
    read_header,
    save_adapter,
    save_routed_adapter,
)
from fewstep.adapters.conversion.convert import convert_file
from fewstep.doctor.adapter_file import examine_adapter
from fewstep.doctor.stock_load import try_stock_load
from fewstep.doctor.subject import StockLoad
from fewstep.errors import AdapterError, PipelineError, RecipeError, ShapeError
from fewstep.heads.routing import embedding_of_call, nearest, prompt_embedding
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.modular import FewStepModularPipeline
from fewstep.recipe import FewStepRecipe, Guidance, Lora, Route
from tests.expert_files import assert_same_picture, draw, expert_file, expert_recipe
from tests.head_files import (
    ROUTES,
    assert_bits_equal,
    component_of,
    denoiser,
    lora_tensors,
    routed_file,
    routed_recipe,
    state_of,
    wrapped,
)
from tests.test_pipeline_modular import modular
from tests.tiny_pipelines import (
    ALL_FAMILIES,
    FLUX,
    PIXART,
    QWEN_IMAGE,
    SD3,
    SD15,
    SDXL,
    Z_IMAGE,
    TinyFamily,
)

POLICIES = pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
FAMILIES = pytest.mark.parametrize(
    "family", [f for f in ALL_FAMILIES if f.name != "wan22"], ids=lambda family: family.name
)
SEEDS = (11, 12)


def prompts(family: TinyFamily, count: int = 2) -> Tensor:
    """Embeddings of the tiny families' first prompts. Shape (count, width)."""
    tokens = family.arguments(count)["prompt_embeds"]
    return prompt_embedding(torch.stack(list(tokens)))


def arguments_of(family: TinyFamily, index: int) -> dict[str, Any]:
    """A call with one of the tiny families' prompts."""
    given = family.arguments(index + 1)
    return {
        name: value[index : index + 1] if isinstance(value, Tensor | list) else value
        for name, value in given.items()
    }


def draw_prompt(pipe: Any, family: TinyFamily, index: int) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments_of(family, index), seed=0)[0]


def expert_alone(family: TinyFamily, folder: Path, seed: int, **options: Any) -> FewStepPipeline:
    """One student as a plain adapter."""
    file = save_adapter(
        folder / f"{seed}.safetensors",
        lora_tensors(family, seed),
        recipe=family.recipe(),
        rank=2,
        alpha=2.0,
        title="alone",
        component=component_of(family),
    )
    return wrapped(family, adapter=file, **options)


# --- arithmetic


def test_an_embedding_is_the_mean_of_the_tokens_that_count() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]]]).bfloat16()
    torch.testing.assert_close(prompt_embedding(tokens), torch.tensor([[18.0, 22.0]]))
    for mask in (torch.tensor([[1, 1, 0]]), torch.tensor([[True, True, False]])):
        torch.testing.assert_close(prompt_embedding(tokens, mask), torch.tensor([[2.0, 3.0]]))
    assert prompt_embedding(tokens, torch.zeros(1, 3)).tolist() == [[0.0, 0.0]]
    with pytest.raises(ShapeError, match=r"mean of its tokens \(B, tokens, width\), got \(1, 2\)"):
        prompt_embedding(torch.zeros(1, 2))


def test_the_nearest_centroid_is_that_of_least_distance() -> None:
    centroids = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    embeddings = torch.tensor([[1.9, 0.0], [2.1, 0.0], [2.0, 9.0]])
    assert nearest(embeddings, centroids).tolist() == [0, 1, 0]
    with pytest.raises(ShapeError, match="have width 3, the centroids 2; use the base"):
        nearest(torch.zeros(1, 3), centroids)


def test_a_call_is_read_by_the_names_of_diffusers_denoisers() -> None:
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = prompt_embedding(tokens, mask)
    for name in ("encoder_attention_mask", "encoder_hidden_states_mask"):
        call = {"encoder_hidden_states": tokens, name: mask, "sample": tokens}
        torch.testing.assert_close(embedding_of_call(call), expected)
    none = {"encoder_hidden_states": tokens, "encoder_attention_mask": None}
    torch.testing.assert_close(embedding_of_call(none), tokens.mean(1))
    listed = {"cap_feats": [tokens[0], tokens[1, :1]]}
    torch.testing.assert_close(
        embedding_of_call(listed), torch.stack([tokens[0].mean(0), tokens[1, 0]])
    )
    with pytest.raises(ShapeError, match="called without text embeddings"):
        embedding_of_call({"sample": tokens})


# --- the file


def test_the_file_holds_every_expert_and_its_centroid(tmp_path: Path) -> None:
    centroids = prompts(SD3)
    file = routed_file(SD3, tmp_path / "a.safetensors", centroids, dtype="fp16")
    found = safetensors.torch.load_file(file)
    for name, seed, centroid in zip(ROUTES, SEEDS, centroids, strict=True):
        assert torch.equal(found[f"route.{name}.centroid"], centroid)
        for key, values in lora_tensors(SD3, seed).items():
            assert torch.equal(found[f"route.{name}.transformer.{key}"], values.half())
    assert len(found) == 2 * (4 + 1)
    parts = adapter_parts(read_header(file))
    assert (parts.kind, sorted(parts.routes)) == ("routes", sorted(ROUTES))
    assert read_header(file).recipe() == routed_recipe(SD3, lora=Lora(alpha="baked"))
    again = routed_file(SD3, tmp_path / "b.safetensors", centroids, dtype="fp16")
    assert again.read_bytes() == file.read_bytes()


def test_inspect_names_the_experts_and_covers_all_of_them(tmp_path: Path) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    SD3.build().save_pretrained(tmp_path / "base")
    report = inspect_adapter(file, tmp_path / "base", values=True)
    assert "kind      one adapter per group of prompts: round, straight" in report.to_text()
    assert report.num_modules == 4
    assert report.coverage is not None
    assert report.coverage.modules == 4
    assert report.errors == ()
    SD15.build().save_pretrained(tmp_path / "other")
    other = inspect_adapter(file, tmp_path / "other")
    assert "none of 2 modules fit this base" in (other.coverage_error or "")


def test_what_makes_no_routes_is_not_written(tmp_path: Path) -> None:
    def save(routes: dict[str, RouteWeights], recipe: FewStepRecipe) -> None:
        save_routed_adapter(
            tmp_path / "a.safetensors", routes, recipe=recipe, rank=2, alpha=2.0, title="a"
        )

    tensors, centroid = lora_tensors(SD3, 1), torch.zeros(16)
    one, other = RouteWeights(tensors, centroid), RouteWeights(tensors, torch.zeros(15))
    with pytest.raises(AdapterError, match=r"routes are \['round', 'straight'\], but .*'bent'"):
        save({"round": one, "bent": one}, routed_recipe(SD3))
    with pytest.raises(AdapterError, match=r"centroids have the shapes \[\(15,\), \(16,\)\]"):
        save({"round": one, "straight": other}, routed_recipe(SD3))
    with pytest.raises(AdapterError, match="needs at least one module"):
        save({"round": one, "straight": RouteWeights({}, centroid)}, routed_recipe(SD3))
    bad = RouteWeights(tensors, torch.full((16,), math.inf))
    with pytest.raises(AdapterError, match="centroid has values that are not finite"):
        save({"round": one, "straight": bad}, routed_recipe(SD3))
    assert list(tmp_path.iterdir()) == []


def test_other_programs_get_no_names_for_it(tmp_path: Path) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    with pytest.raises(AdapterError, match="one adapter per group of prompts: round, straight, wh"):
        convert_file(file, tmp_path / "b.safetensors", "diffusers")


def test_stock_diffusers_refuses_the_file_or_finds_nothing_in_it(tmp_path: Path) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    stock: Any = SD3.build()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    other = routed_file(FLUX, tmp_path / "b.safetensors", prompts(FLUX))
    assert try_stock_load(FLUX.build(), read_header(other)) == StockLoad(0)
    found = examine_adapter(other).findings
    assert [finding.code for finding in found] == ["adapter/not-plain-lora"]


# --- on pipelines


@FAMILIES
def test_a_prompt_is_drawn_by_the_expert_of_its_centroid(
    family: TinyFamily, tmp_path: Path
) -> None:
    file = routed_file(family, tmp_path / "a.safetensors", prompts(family))
    pipe = wrapped(family, adapter=file)
    expected = [
        draw_prompt(expert_alone(family, tmp_path, seed), family, index)
        for index, seed in enumerate(SEEDS)
    ]
    for index in (0, 1, 0):
        assert_same_picture(draw_prompt(pipe, family, index), expected[index])
    other = draw_prompt(expert_alone(family, tmp_path, SEEDS[1]), family, 0)
    assert not torch.allclose(other, expected[0], atol=1e-2)


@POLICIES
@pytest.mark.parametrize("family", [SD15, SD3, PIXART], ids=lambda family: family.name)
def test_experts_take_turns_by_any_policy_and_leave_without_a_trace(
    policy: str, family: TinyFamily, tmp_path: Path
) -> None:
    file = routed_file(family, tmp_path / "a.safetensors", prompts(family))
    pipe = wrapped(family, adapter=file, experts=policy)
    for index, seed in ((1, SEEDS[1]), (0, SEEDS[0])):
        expected = draw_prompt(expert_alone(family, tmp_path, seed), family, index)
        assert_same_picture(draw_prompt(pipe, family, index), expected)
    model = denoiser(pipe, family)
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, family), state_of(family.build(), family))
    assert model._forward_pre_hooks == {}


def test_a_prompt_near_a_centroid_is_enough(tmp_path: Path) -> None:
    centroids = prompts(SD3)
    centroids += 0.2 * (centroids.flip(0) - centroids)
    pipe = wrapped(SD3, adapter=routed_file(SD3, tmp_path / "a.safetensors", centroids))
    expected = draw_prompt(expert_alone(SD3, tmp_path, SEEDS[1]), SD3, 1)
    assert_same_picture(draw_prompt(pipe, SD3, 1), expected)


@pytest.mark.parametrize("family", [SD3, FLUX, Z_IMAGE, QWEN_IMAGE], ids=lambda f: f.name)
def test_prompts_of_one_expert_share_a_call_and_others_are_refused(
    family: TinyFamily, tmp_path: Path
) -> None:
    near = prompts(family, 3)
    centroids = torch.stack([near[0], near[1:].mean(0)])
    pipe: Any = wrapped(family, adapter=routed_file(family, tmp_path / "a.safetensors", centroids))
    with pytest.raises(PipelineError, match=r"\(round, straight, straight\), .* once per prompt"):
        pipe(**family.arguments(3), seed=0)
    given = {
        name: value[1:] if isinstance(value, Tensor | list) else value
        for name, value in family.arguments(3).items()
    }
    both = pipe(**given, seed=[4, 5])[0]
    alone: Any = expert_alone(family, tmp_path, SEEDS[1])
    assert_same_picture(both, alone(**given, seed=[4, 5])[0])


def test_several_pictures_of_a_prompt_are_one_call(tmp_path: Path) -> None:
    pipe: Any = wrapped(SD3, adapter=routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3)))
    pictures = pipe(**SD3.arguments(1), num_images_per_prompt=2, seed=0)[0]
    assert_same_picture(pictures[:1], draw_prompt(pipe, SD3, 0))


def test_padding_does_not_choose(tmp_path: Path) -> None:
    """Tokens that the mask leaves out are not looked at, whatever is in them."""
    tokens = PIXART.arguments(2)["prompt_embeds"]
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    centroids = prompt_embedding(tokens, mask.expand(2, -1))
    pipe: Any = wrapped(PIXART, adapter=routed_file(PIXART, tmp_path / "a.safetensors", centroids))
    given = {**PIXART.arguments(1), "prompt_attention_mask": mask}
    expected = pipe(**given, seed=0)[0]
    given["prompt_embeds"] = given["prompt_embeds"].clone()
    given["prompt_embeds"][:, 4:] = 100.0 * centroids[1]
    given["prompt_attention_mask"] = mask
    alone: Any = expert_alone(PIXART, tmp_path, SEEDS[0])
    found = pipe(**given, seed=0)[0]
    assert_same_picture(found, alone(**given, seed=0)[0])
    assert_same_picture(found, expected)


def test_describe_names_who_serves_which_prompts(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3)))
    text = pipe.describe()
    assert "adapter   a.safetensors at scale 1 for prompts near round" in text
    assert "adapter   a.safetensors at scale 1 for prompts near straight" in text
    assert [a.name for a in pipe.adapters] == ["fewstep_round", "fewstep_straight"]


def test_the_scale_of_the_caller_reaches_every_expert(tmp_path: Path) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    pipe = wrapped(SD3, adapter=file, adapter_scale=0.5)
    alone = expert_alone(SD3, tmp_path, SEEDS[1], adapter_scale=0.5)
    assert_same_picture(draw_prompt(pipe, SD3, 1), draw_prompt(alone, SD3, 1))


def test_a_style_lora_reaches_every_expert(tmp_path: Path) -> None:
    style = expert_file(SD3, tmp_path / "style.safetensors", seed=3)
    ours: Any = wrapped(SD3, adapter=routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3)))
    alone: Any = expert_alone(SD3, tmp_path, SEEDS[1])
    for pipe, names in ((ours, [f"fewstep_{name}" for name in ROUTES]), (alone, ["fewstep"])):
        with warnings.catch_warnings():  # peft asks to take care with several adapters
            warnings.simplefilter("ignore", UserWarning)
            pipe.load_lora_weights(str(style), adapter_name="style")
        pipe.set_adapters([*names, "style"], [*[1.0] * len(names), 0.5])
    assert_same_picture(draw_prompt(ours, SD3, 1), draw_prompt(alone, SD3, 1))


def test_a_compiled_network_is_routed_too(tmp_path: Path) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    pipe: Any = wrapped(SD3, adapter=file, experts="hotswap")
    expected = [draw_prompt(pipe, SD3, index) for index in (0, 1)]
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for index in (0, 1, 0):
        assert_same_picture(draw_prompt(pipe, SD3, index), expected[index])
    torch.compiler.reset()


# --- refusals


def test_recipe_and_file_must_have_the_same_routes(tmp_path: Path) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    plain = expert_file(SD3, tmp_path / "b.safetensors", seed=1)
    with pytest.raises(AdapterError, match="with routes, but this recipe has none"):
        wrapped(SD3, adapter=file, recipe=SD3.recipe())
    with pytest.raises(AdapterError, match="holds no expert of any route, but this recipe routes"):
        wrapped(SD3, adapter=plain, recipe=routed_recipe(SD3))
    bent = SD3.recipe(routes=(Route(adapter="round"), Route(adapter="bent")))
    with pytest.raises(AdapterError, match="holds experts round, straight, .* to round, bent"):
        wrapped(SD3, adapter=file, recipe=bent)
    with pytest.raises(PipelineError, match="routes prompts to 'round' and 'straight'; pass adap"):
        wrapped(SD3, recipe=routed_recipe(SD3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"route.round.centroid": None}, "route 'round' has no centroid"),
        ({"route.bent.centroid": torch.zeros(16)}, "route 'bent' has no adapter tensors"),
        (
            {"route.round.centroid": torch.zeros(15)},
            r"centroids have the shapes \[\[15\], \[16\]\]",
        ),
        ({"route.round.centroid": torch.full((16,), math.nan)}, "centroid' holds NaN or infinity"),
        ({"x.lora_A.weight": torch.zeros(2, 4)}, "beside them 'x.lora_A.weight', which is none of"),
        (
            {
                "route.round.text_encoder.x.lora_A.weight": torch.zeros(2, 4),
                "route.round.text_encoder.x.lora_B.weight": torch.zeros(4, 2),
            },
            "for some of the steps or prompts, but has LoRA modules for text_encoder",
        ),
        (
            {"route.straight.transformer.transformer_blocks.0.attn.to_q.lora_A.weight": None},
            "no down matrix",
        ),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_changes(
    change: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    tensors = safetensors.torch.load_file(file) | change
    safetensors.torch.save_file({n: t for n, t in tensors.items() if t is not None}, file)
    stock = SD3.build()
    with pytest.raises(AdapterError, match=said):
        FewStepPipeline.wrap(stock, adapter=file, recipe=routed_recipe(SD3))
    assert_bits_equal(state_of(stock, SD3), state_of(SD3.build(), SD3))


def test_centroids_of_another_base_are_refused_when_a_prompt_comes(tmp_path: Path) -> None:
    file = routed_file(SDXL, tmp_path / "a.safetensors", torch.randn(2, 32))
    with pytest.raises(PipelineError, match="have width 64, the centroids 32; use the base"):
        draw(wrapped(SDXL, adapter=file), SDXL)


def test_several_experts_are_neither_fused_nor_saved(tmp_path: Path) -> None:
    file = routed_file(SD3, tmp_path / "a.safetensors", prompts(SD3))
    for policy in ("adapters", "fused", "hotswap"):
        pipe = wrapped(SD3, adapter=file, experts=policy)
        with pytest.raises(PipelineError, match="share transformer, whose weights can hold one"):
            pipe.fuse()
        with pytest.raises(PipelineError, match="share transformer, whose weights can hold one"):
            pipe.save_pretrained(tmp_path / "saved")


def test_modular_pipelines_point_to_the_classic_one(tmp_path: Path) -> None:
    file = routed_file(FLUX, tmp_path / "a.safetensors", prompts(FLUX))
    with pytest.raises(PipelineError, match="routes prompts to experts, which modular pipelines"):
        FewStepModularPipeline.wrap(modular(FLUX), adapter=file)


# --- recipes


def test_routes_go_through_json_and_recipes_without_them_do_not_mention_them() -> None:
    routes = (Route(adapter="round", prompts=("a zero", "an eight")), Route(adapter="straight"))
    recipe = SD3.recipe(routes=routes)
    assert FewStepRecipe.from_json(recipe.to_json()) == recipe
    assert '"prompts": ["a zero", "an eight"]' in recipe.to_json()
    assert "routes" not in SD3.recipe().to_json()


def test_what_routes_do_not_go_with() -> None:
    two = routed_recipe(SD3).routes
    for odd in (two[:1], (*two, two[0])):
        with pytest.raises(RecipeError, match="two or more adapters, each named once"):
            SD3.recipe(routes=odd)
    with pytest.raises(RecipeError, match="routes and experts cannot be combined"):
        replace(expert_recipe(SD3), routes=two)
    with pytest.raises(RecipeError, match="empty prompt of the second pass is in no group"):
        SD3.recipe(routes=two, guidance=Guidance(mode="cfg", scale=3.0))
    with pytest.raises(RecipeError, match="letters, digits, - or _, as it is a part of tensor"):
        Route(adapter="a.b")
