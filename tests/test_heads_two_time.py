"""The two-time head: its arithmetic, its place in every denoiser, its file, and the flow map."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fewstep.adapters import (
    adapter_parts,
    inspect_adapter,
    read_header,
    save_adapter,
    save_two_time_adapter,
)
from fewstep.adapters.conversion.convert import convert_file
from fewstep.doctor.adapter_file import examine_adapter
from fewstep.doctor.stock_load import try_stock_load
from fewstep.doctor.subject import StockLoad
from fewstep.errors import AdapterError, PipelineError, RecipeError, ShapeError
from fewstep.heads.embedder import timestep_embedder
from fewstep.heads.two_time import (
    TwoTimeEmbedding,
    TwoTimeHead,
    add_gap,
    current_gap,
    sinusoid,
    target_time,
)
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.modular import FewStepModularPipeline
from fewstep.pipeline.stock_scheduler import stock_scheduler
from fewstep.pipeline.teacher_refine import TeacherRefine
from fewstep.recipe import FewStepRecipe, Guidance, Lora, Sampler, SolverRow
from fewstep.schedulers import FewStepScheduler
from fewstep.zoo import entry
from tests.expert_files import assert_same_picture, draw, expert_file, expert_recipe
from tests.head_files import (
    add_lora_by_hand,
    assert_bits_equal,
    denoiser,
    lora_tensors,
    state_of,
    trained_head,
    two_time_file,
    two_time_recipe,
    wrapped,
)
from tests.test_pipeline_modular import modular
from tests.tiny_pipelines import (
    ALL_FAMILIES,
    FLUX,
    QWEN_IMAGE,
    SANA,
    SD3,
    SDXL,
    WAN21,
    Z_IMAGE,
    TinyFamily,
    vp_recipe,
)

stock: Any = diffusers
FLOW_FAMILIES = [SD3, FLUX, SANA, QWEN_IMAGE, WAN21, Z_IMAGE]
FAMILIES = pytest.mark.parametrize("family", FLOW_FAMILIES, ids=lambda family: family.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- arithmetic


def test_the_sinusoid_is_cosines_then_sines_of_falling_frequencies() -> None:
    found = sinusoid(torch.tensor([0.0, 3.0]), 4)
    expected = [[1.0, 1.0, 0.0, 0.0], [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert sinusoid(torch.tensor([1], dtype=torch.int64), 4).dtype == torch.float32
    assert sinusoid(torch.tensor([1.0]).double(), 4).dtype == torch.float64


def test_a_head_is_two_layers_of_the_gap_and_nothing_at_first() -> None:
    head = TwoTimeHead(6, 5, 8, torch.Generator().manual_seed(1))
    gap = torch.tensor([0.0, 125.0, 1000.0])
    assert torch.equal(head(gap), torch.zeros(3, 6))
    with torch.no_grad():
        head.linear_2.weight.normal_(generator=torch.Generator().manual_seed(2))
        head.linear_2.bias.fill_(0.5)
    inner = sinusoid(gap, 8) @ head.linear_1.weight.T + head.linear_1.bias
    expected = (inner * inner.sigmoid()) @ head.linear_2.weight.T + 0.5
    torch.testing.assert_close(head(gap), expected)


def test_a_seed_gives_the_same_head_and_torchs_own_stream_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one, two = (TwoTimeHead(6, 5, 8, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(torch.rand(4), expected)
    assert_bits_equal(one.state_dict(), two.state_dict())
    bound = 1.0 / math.sqrt(8)
    assert 0.5 * bound < one.linear_1.weight.abs().max().item() <= bound


def test_a_head_comes_back_from_its_tensors() -> None:
    head = trained_head(SD3)
    assert_bits_equal(TwoTimeHead.from_tensors(head.state_dict()).state_dict(), head.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"linear_1.weight": None},
        {"linear_1.weight": torch.zeros(12)},
        {"linear_1.weight": torch.zeros(12, 31)},
        {"linear_1.bias": torch.zeros(11)},
        {"linear_2.weight": torch.zeros(16, 11)},
        {"linear_3.weight": torch.zeros(1)},
    ],
)
def test_other_tensors_make_no_head(change: dict[str, Any]) -> None:
    tensors = trained_head(SD3).state_dict() | change
    with pytest.raises(ShapeError, match="a two-time head"):
        TwoTimeHead.from_tensors({n: t for n, t in tensors.items() if t is not None})


def test_the_target_is_told_inside_the_block_only() -> None:
    assert current_gap() is None
    now = torch.tensor([800.0, 400.0])
    with target_time(torch.tensor([200.0, 0.0]), now):
        assert torch.equal(current_gap(), torch.tensor([600.0, 400.0]))  # pyright: ignore
        with target_time(torch.zeros(1), now):
            assert torch.equal(current_gap(), now)  # pyright: ignore
        assert torch.equal(current_gap(), torch.tensor([600.0, 400.0]))  # pyright: ignore
    assert current_gap() is None


def test_the_embedding_adds_the_head_inside_a_target_and_nothing_outside() -> None:
    place = timestep_embedder(denoiser(SD3.build(), SD3))
    head = trained_head(SD3)
    both = TwoTimeEmbedding(place.module, head)
    projection, gap = normal(2, 256), torch.tensor([600.0, 300.0])
    plain = place.module(projection)
    assert torch.equal(both(projection), plain)
    with target_time(torch.tensor([200.0, 100.0]), torch.tensor([800.0, 400.0])):
        torch.testing.assert_close(both(projection), plain + head(gap))
    fresh = TwoTimeEmbedding(place.module, trained_head(SD3, strength=0.0))
    none = TwoTimeEmbedding(place.module, _Nothing())
    with target_time(torch.zeros(1), torch.tensor([800.0])):
        assert torch.equal(fresh(projection), plain)
        assert torch.equal(none(projection), plain)
    tokens = normal(2, 3, place.width)  # a time for each token
    torch.testing.assert_close(add_gap(tokens, head, gap[:1], 0.5), tokens + 0.5 * head(gap[:1]))
    half = projection.bfloat16() @ normal(256, place.width).bfloat16()
    assert add_gap(half, head, gap).dtype == torch.bfloat16


class _Nothing(nn.Module):
    def forward(self, gap: Tensor) -> None:
        return None


def test_gradients_reach_the_head_and_flow_through_both_times() -> None:
    head = trained_head(SD3).double()
    now, target = (torch.tensor([t], dtype=torch.float64, requires_grad=True) for t in (8.0, 3.0))
    with target_time(target, now):
        gap = current_gap()
    assert gap is not None
    head(gap).sum().backward()
    assert now.grad is not None
    assert target.grad is not None
    assert float(now.grad) == -float(target.grad) != 0.0
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on import
def test_forward_derivatives_go_through_the_times() -> None:
    """What MeanFlow's target needs: du/dt along (x, t) with s held, by torch.func.jvp."""
    place = timestep_embedder(denoiser(SD3.build(), SD3))
    both = TwoTimeEmbedding(place.module, trained_head(SD3)).double()

    def network(now: Tensor) -> Tensor:
        with target_time(torch.full_like(now, 200.0), now):
            return both(sinusoid(now, 256))

    now, step = torch.tensor([800.0, 400.0], dtype=torch.float64), 1e-4
    found: Tensor = torch.func.jvp(network, (now,), (torch.ones_like(now),))[1]
    expected = (network(now + step) - network(now - step)) / (2.0 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# --- its place


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
def test_the_place_is_where_the_timestep_is_embedded(family: TinyFamily) -> None:
    """What is given there follows the timestep alone: same for other prompts, sizes, guidance."""
    pipe = wrapped(family, recipe=family.recipe())
    place = timestep_embedder(denoiser(pipe, family))
    seen: list[Tensor] = []
    place.module.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    draw(pipe, family)
    assert len(seen) >= 1
    assert all(out.shape[-1] == place.width for out in seen)
    first = seen[0].clone()
    if family.name != "wan22":
        assert len(seen) == 4
        assert not torch.allclose(seen[0], seen[1])
    del seen[:]
    arguments = {**family.arguments(1), "height": 64, "width": 64}
    pipe(**arguments, seed=3)
    torch.testing.assert_close(seen[0], first)


def test_embeddings_of_guidance_and_sizes_are_not_taken_for_it() -> None:
    with_guidance = stock.models.embeddings.CombinedTimestepGuidanceTextProjEmbeddings(16, 16)
    assert timestep_embedder(with_guidance).path == "timestep_embedder"
    sizes = stock.models.embeddings.PixArtAlphaCombinedTimestepSizeEmbeddings(18, 6, True)
    assert timestep_embedder(sizes).path == "timestep_embedder"
    assert timestep_embedder(denoiser(SDXL.build(), SDXL)).path == "time_embedding"


def test_a_model_without_one_place_is_refused() -> None:
    with pytest.raises(ShapeError, match="Linear has none of the timestep embeddings"):
        timestep_embedder(nn.Linear(2, 2))
    two = nn.ModuleDict({name: denoiser(SD3.build(), SD3) for name in ("video", "audio")})
    with pytest.raises(ShapeError, match=r"ModuleDict has 2 \(video.time_text_embed"):
        timestep_embedder(two)


# --- the file


def test_the_file_holds_lora_and_head(tmp_path: Path) -> None:
    head = trained_head(SD3)
    file = two_time_file(SD3, tmp_path / "a.safetensors", head=head, dtype="bf16")
    found = safetensors.torch.load_file(file)
    assert_bits_equal(
        {n: t for n, t in found.items() if n.startswith("two_time.")},
        {f"two_time.{n}": t for n, t in head.state_dict().items()},
    )
    lora = {f"transformer.{n}": t.bfloat16() for n, t in lora_tensors(SD3, 1).items()}
    assert_bits_equal({n: t for n, t in found.items() if n in lora}, lora)
    assert len(found) == len(lora) + 4
    assert adapter_parts(read_header(file)).kind == "two_time"
    assert read_header(file).recipe() == two_time_recipe(SD3, lora=Lora(alpha="baked"))
    again = two_time_file(SD3, tmp_path / "b.safetensors", head=head, dtype="bf16")
    assert again.read_bytes() == file.read_bytes()
    report = inspect_adapter(file)
    assert (report.kind, report.num_modules) == ("two_time", 2)
    assert "kind      LoRA with a head that is told the target time" in report.to_text()
    assert not any("are not plain LoRA" in text for text in report.warnings)


def test_the_recipes_scale_is_multiplied_into_lora_and_head(tmp_path: Path) -> None:
    head, recipe = trained_head(SD3), two_time_recipe(SD3, lora=Lora(scale=0.5))
    file = two_time_file(SD3, tmp_path / "a.safetensors", head=head, recipe=recipe)
    found = safetensors.torch.load_file(file)
    for name, values in head.state_dict().items():
        factor = 0.5 if name.startswith("linear_2") else 1.0
        assert torch.equal(found[f"two_time.{name}"], factor * values)
    for name, values in lora_tensors(SD3, 1).items():
        factor = 0.5 if "lora_B" in name else 1.0
        assert torch.equal(found[f"transformer.{name}"], factor * values)


def test_what_is_no_two_time_adapter_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="recipe says 'step'; correct the recipe"):
        two_time_file(SD3, tmp_path / "a.safetensors", recipe=SD3.recipe())
    with pytest.raises(AdapterError, match="pass the state_dict of a TwoTimeHead"):
        save_two_time_adapter(
            tmp_path / "a.safetensors",
            lora_tensors(SD3, 1),
            {"linear_1.weight": torch.zeros(2, 2)},
            recipe=two_time_recipe(SD3),
            rank=2,
            alpha=2.0,
            title="a",
        )
    assert list(tmp_path.iterdir()) == []


def test_other_programs_get_no_names_for_it(tmp_path: Path) -> None:
    file = two_time_file(SD3, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="told the target time, which no other program"):
        convert_file(file, tmp_path / "b.safetensors", "comfyui")


@pytest.mark.parametrize("family", [SD3, SANA, QWEN_IMAGE, WAN21], ids=lambda f: f.name)
def test_stock_diffusers_refuses_the_file(family: TinyFamily, tmp_path: Path) -> None:
    file = two_time_file(family, tmp_path / "a.safetensors")
    pipe: Any = family.build()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)


def test_the_flux_loader_leaves_the_head_out_which_the_doctor_says(tmp_path: Path) -> None:
    file = two_time_file(FLUX, tmp_path / "a.safetensors")
    loaded = try_stock_load(FLUX.build(), read_header(file))
    assert loaded == StockLoad(4)
    codes = {finding.code for finding in examine_adapter(file).findings}
    assert codes == {"adapter/not-plain-lora", "comfyui/no-sampler"}


# --- the flow map


def by_hand(
    family: TinyFamily, head: TwoTimeHead, recipe: FewStepRecipe, **arguments: Any
) -> Tensor:
    """The picture with the LoRA in the weights, TwoTimeEmbedding in its place and targets told."""
    pipe = family.build()
    model = denoiser(pipe, family)
    add_lora_by_hand(model, lora_tensors(family, 1))
    place = timestep_embedder(model)
    parent, _, child = place.path.rpartition(".")
    setattr(model.get_submodule(parent), child, TwoTimeEmbedding(place.module, head))
    levels, calls = recipe.levels(), iter(range(99))
    plain = model.forward

    def told(*args: Any, **kwargs: Any) -> Any:
        index = next(calls)
        now, following = levels[index], levels[index + 1]
        with target_time(torch.tensor([following.timestep]), torch.tensor([now.timestep])):
            return plain(*args, **kwargs)

    model.forward = told
    plain_recipe = replace(recipe, sampler=Sampler())
    return draw(FewStepPipeline.wrap(pipe, recipe=plain_recipe), family, **arguments)


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
@FAMILIES
def test_the_network_is_told_where_each_step_ends(
    family: TinyFamily, policy: str, tmp_path: Path
) -> None:
    head, recipe = trained_head(family), two_time_recipe(family)
    file = two_time_file(family, tmp_path / "a.safetensors", head=head)
    expected = by_hand(family, head, recipe)
    pipe = wrapped(family, adapter=file, experts=policy)
    assert_same_picture(draw(pipe, family), expected)
    without = by_hand(family, trained_head(family, strength=0.0), recipe)
    assert not torch.allclose(expected, without, atol=1e-2)
    assert "flow map" in pipe.describe()
    before = state_of(family.build(), family)
    pipe.unwrap()
    assert_bits_equal(state_of(pipe, family), before)
    assert timestep_embedder(denoiser(pipe, family)).module._forward_hooks == {}


def test_a_step_is_the_average_velocity_times_the_distance(tmp_path: Path) -> None:
    """The whole of SD3's loop by hand: x - (sigma_t - sigma_s) u(x, t, s)."""
    head, recipe = trained_head(SD3), two_time_recipe(SD3)
    file = two_time_file(SD3, tmp_path / "a.safetensors", head=head)
    model: Any = denoiser(SD3.build(), SD3)
    add_lora_by_hand(model, lora_tensors(SD3, 1))
    embed = model.time_text_embed
    embed.timestep_embedder = TwoTimeEmbedding(embed.timestep_embedder, head)
    arguments = SD3.arguments(1)
    sample = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    levels = recipe.levels()
    for now, following in zip(levels, levels[1:], strict=False):
        time = torch.tensor([now.timestep])
        with torch.no_grad(), target_time(torch.tensor([following.timestep]), time):
            velocity = model(
                sample,
                timestep=time,
                encoder_hidden_states=arguments["prompt_embeds"],
                pooled_projections=arguments["pooled_prompt_embeds"],
            ).sample
        sample = sample - (now.sigma - following.sigma) * velocity
    assert_same_picture(draw(wrapped(SD3, adapter=file), SD3), sample)


def test_a_head_that_adds_nothing_draws_the_plain_adapters_picture(tmp_path: Path) -> None:
    zero = two_time_file(SD3, tmp_path / "a.safetensors", head=trained_head(SD3, strength=0.0))
    plain = save_adapter(
        tmp_path / "b.safetensors",
        lora_tensors(SD3, 1),
        recipe=SD3.recipe(),
        rank=2,
        alpha=2.0,
        title="plain",
    )
    expected = draw(wrapped(SD3, adapter=plain), SD3)
    assert torch.equal(draw(wrapped(SD3, adapter=zero), SD3), expected)


def test_the_adapters_scale_reaches_the_head(tmp_path: Path) -> None:
    head = trained_head(SD3)
    file = two_time_file(SD3, tmp_path / "a.safetensors", head=head)
    plain = draw(wrapped(SD3, recipe=SD3.recipe()), SD3)
    assert torch.equal(draw(wrapped(SD3, adapter=file, adapter_scale=0.0), SD3), plain)
    halved = two_time_recipe(SD3, lora=Lora(scale=0.5))
    half = two_time_file(SD3, tmp_path / "b.safetensors", head=head, recipe=halved)
    expected = draw(wrapped(SD3, adapter=half), SD3)
    assert_same_picture(draw(wrapped(SD3, adapter=file, adapter_scale=0.5), SD3), expected)


def gaps(pipe: Any, family: TinyFamily) -> list[float]:
    """t - s of every network call from now on."""
    seen: list[float] = []
    head = pipe._fewstep.experts._head
    head.register_forward_pre_hook(lambda module, args: seen.append(float(args[0])))
    return seen


def test_every_grid_of_a_call_tells_its_own_gaps(tmp_path: Path) -> None:
    two, four = (
        two_time_recipe(SD3, grids=SD3.recipe(timesteps=timesteps).grids, default_steps=count)
        for timesteps, count in (((1000.0, 500.0), 2), ((1000.0, 937.5, 750.0, 500.0), 4))
    )
    recipe = replace(four, grids=(*two.grids, *four.grids))
    pipe = wrapped(SD3, adapter=two_time_file(SD3, tmp_path / "a.safetensors", recipe=recipe))
    seen = gaps(pipe, SD3)
    for steps, expected in ((2, [500, 500]), (4, [62.5, 187.5, 250, 500]), (2, [500, 500])):
        del seen[:]
        draw(pipe, SD3, num_inference_steps=steps)
        assert seen[-steps:] == pytest.approx(expected)  # the first call is probed once more


def test_image_to_image_made_of_it_shares_the_head_and_tells_inserted_gaps(tmp_path: Path) -> None:
    grids = SD3.recipe(timesteps=(1000.0, 500.0)).grids
    recipe = two_time_recipe(SD3, grids=grids, default_steps=2)
    pipe: Any = wrapped(SD3, adapter=two_time_file(SD3, tmp_path / "a.safetensors", recipe=recipe))
    draw(pipe, SD3)
    other = FewStepPipeline.wrap(stock.StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    other.set_progress_bar_config(disable=True)
    seen = gaps(pipe, SD3)
    arguments = {k: v for k, v in SD3.arguments(1).items() if k not in ("height", "width")}
    other(
        **arguments,
        image=torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1)),
        strength=0.6,
        strength_rule="insert",
        seed=0,
    )
    assert seen == pytest.approx([100.0, 500.0])
    pipe.unwrap()
    other.unwrap()
    assert timestep_embedder(denoiser(pipe, SD3)).module._forward_hooks == {}


def test_a_batch_and_a_guided_call_are_told_the_same_gap(tmp_path: Path) -> None:
    guidance = Guidance(mode="cfg", scale=2.5, negative_prompt="works")
    head, recipe = trained_head(SD3), two_time_recipe(SD3, guidance=guidance)
    file = two_time_file(SD3, tmp_path / "a.safetensors", head=head, recipe=recipe)
    empty: dict[str, Any] = {
        "negative_prompt_embeds": normal(1, 6, 16, seed=8),
        "negative_pooled_prompt_embeds": normal(1, 16, seed=9),
    }
    expected = by_hand(SD3, head, recipe, **empty)
    pipe: Any = wrapped(SD3, adapter=file)
    assert_same_picture(draw(pipe, SD3, **empty), expected)
    two = {name: values.repeat(2, *[1] * (values.ndim - 1)) for name, values in empty.items()}
    assert_same_picture(pipe(**SD3.arguments(2), **two, seed=[0, 7])[0][:1], expected)


def test_a_copy_of_the_pipeline_has_a_head_of_its_own(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=two_time_file(SD3, tmp_path / "a.safetensors"))
    expected = draw(pipe, SD3)
    twin = copy.deepcopy(pipe)
    pipe.unwrap()
    assert_same_picture(draw(twin, SD3), expected)
    twin.unwrap()
    assert timestep_embedder(denoiser(twin, SD3)).module._forward_hooks == {}


def test_one_graph_serves_all_steps_of_a_compiled_network(tmp_path: Path) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe: Any = wrapped(SD3, adapter=two_time_file(SD3, tmp_path / "a.safetensors"))
    expected = draw(pipe, SD3)
    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    assert_same_picture(draw(pipe, SD3), expected)
    assert len(graphs) == 1
    torch.compiler.reset()


# --- refusals


def test_file_and_recipe_must_both_know_of_the_target(tmp_path: Path) -> None:
    headed = two_time_file(SD3, tmp_path / "a.safetensors")
    plain = expert_file(SD3, tmp_path / "b.safetensors", seed=1)
    with pytest.raises(AdapterError, match="recipe's sampler.kind is 'step'; use the recipe in"):
        wrapped(SD3, adapter=headed, recipe=SD3.recipe())
    with pytest.raises(AdapterError, match="holds no two-time head, but .* is 'flow_map'"):
        wrapped(SD3, adapter=plain, recipe=two_time_recipe(SD3))
    with pytest.raises(PipelineError, match="'flow_map', .* there is no adapter with a two-time"):
        wrapped(SD3, recipe=two_time_recipe(SD3))


@pytest.mark.parametrize("name", ["anyflow-wan2.1-1.3b", "lightx2v-wan2.1-mean-flow"])
def test_public_checkpoints_whose_head_is_not_known_stay_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="is not supported"):
        entry(name).required_recipe()


def test_a_head_of_another_width_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    file = two_time_file(SD3, tmp_path / "a.safetensors", head=TwoTimeHead(24, 12, 32))
    pipe = SD3.build()
    with pytest.raises(AdapterError, match="gives 24 values, but time_text_embed.* has 16"):
        FewStepPipeline.wrap(pipe, adapter=file)
    assert_bits_equal(state_of(pipe, SD3), state_of(SD3.build(), SD3))
    tensors = safetensors.torch.load_file(file)
    del tensors["two_time.linear_2.bias"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(AdapterError, match="a two-time head of this size has"):
        FewStepPipeline.wrap(pipe, adapter=file, recipe=two_time_recipe(SD3))


def test_only_deterministic_flows_are_flow_maps() -> None:
    with pytest.raises(RecipeError, match="'flow_map' needs a flow schedule .* 'epsilon' on kind"):
        vp_recipe("sd15", sampler=Sampler(kind="flow_map"))
    with pytest.raises(RecipeError, match="needs a flow schedule and base.prediction 'flow'"):
        SD3.recipe(prediction="x0", sampler=Sampler(kind="flow_map"))
    odd_samplers: list[dict[str, Any]] = [
        {"stochasticity": 0.5},
        {"clip_x0": 1.0},
        {"noise_correction": True},
    ]
    for odd in odd_samplers:
        with pytest.raises(RecipeError, match="which is deterministic as it is"):
            Sampler(kind="flow_map", **odd)
    with pytest.raises(RecipeError, match="'flow_map' and experts cannot be combined"):
        replace(expert_recipe(SD3), sampler=Sampler(kind="flow_map"))
    grid = SD3.recipe().grids[0]
    for odd in ({"clock": grid.timesteps}, {"solver": (SolverRow(sample=0.0, x0=1.0),) * 4}):
        with pytest.raises(RecipeError, match="the network itself is told where a step ends"):
            two_time_recipe(SD3, grids=(replace(grid, **odd),))


def test_neither_fused_nor_saved_nor_refined(tmp_path: Path) -> None:
    pipe = wrapped(SD3, adapter=two_time_file(SD3, tmp_path / "a.safetensors"))
    with pytest.raises(PipelineError, match=r'cannot be fused; experts="fused" merges the LoRA'):
        pipe.fuse()
    with pytest.raises(PipelineError, match="stock diffusers cannot sample"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(PipelineError, match="is of kind 'two_time'"):
        draw(pipe, SD3, teacher_refine=TeacherRefine())


def test_no_stock_scheduler_stands_in() -> None:
    stand_in = stock_scheduler("StableDiffusion3Pipeline", two_time_recipe(SD3), 4)
    assert stand_in.scheduler is None
    assert "told where each step ends, which no stock scheduler does" in stand_in.deviations[0]


def test_the_scheduler_alone_does_not_step_a_flow_map() -> None:
    scheduler = FewStepScheduler(two_time_recipe(SD3))
    sample = normal(1, 4, 8, 8)
    with pytest.raises(PipelineError, match="nothing tells the network where its step ends"):
        scheduler.step(sample, 1000.0, sample)
    scheduler.is_target_told = True
    moved = scheduler.step(sample, 1000.0, sample).prev_sample
    torch.testing.assert_close(moved, sample - 0.0625 * sample)


def test_a_network_without_a_place_is_refused(tmp_path: Path) -> None:
    file = two_time_file(SD3, tmp_path / "a.safetensors")
    pipe = SD3.build()
    embed: Any = denoiser(pipe, SD3).get_submodule("time_text_embed")
    embed.some_embedder = embed.timestep_embedder
    del embed.timestep_embedder
    with pytest.raises(PipelineError, match="has none of the timestep embeddings"):
        FewStepPipeline.wrap(pipe, adapter=file)
    names = (name for name, _ in denoiser(pipe, SD3).named_parameters())
    assert not any("lora" in name for name in names)


def test_modular_pipelines_point_to_the_classic_one(tmp_path: Path) -> None:
    file = two_time_file(FLUX, tmp_path / "a.safetensors")
    with pytest.raises(PipelineError, match="is a flow map with a head, which modular pipelines"):
        FewStepModularPipeline.wrap(modular(FLUX), adapter=file)
