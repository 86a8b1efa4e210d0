"""Experts with a network each: the pipeline's boundary comes from the recipe; fusing and saving."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.errors import PipelineError, RecipeError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.experts.networks import boundary_ratio, check_counts
from fewstep.recipe import Expert, FewStepRecipe, Grid
from tests.expert_files import deltas_of, draw, expert_folder, expert_recipe
from tests.tiny_pipelines import SD3, WAN21, WAN22, record_denoiser


def recipe_of(grid: Grid, boundary: float, *more: Grid, **changes: Any) -> FewStepRecipe:
    experts = (
        Expert(adapter="high", sigma_high=1.0, sigma_low=boundary, component="transformer"),
        Expert(adapter="low", sigma_high=boundary, sigma_low=0.0, component="transformer_2"),
    )
    grids = (grid, *more)
    return replace(
        WAN22.recipe(),
        grids=grids,
        default_steps=grids[-1].num_steps,
        experts=experts,
        **changes,
    )


def networks_called(recipe: FewStepRecipe, num_steps: int | None = None) -> list[str]:
    """What the real pipeline calls, with weights as they are (already merged ones)."""
    pipe = FewStepPipeline.wrap(WAN22.build(), recipe=recipe, steps=num_steps)
    calls = record_denoiser(pipe, WAN22)
    draw(pipe, WAN22)
    return [name for name, _, _ in calls]


@pytest.mark.parametrize("num_high", [1, 2, 3])
def test_the_pipeline_calls_the_network_the_recipe_names(num_high: int) -> None:
    recipe = expert_recipe(WAN22, own_networks=True, num_high=num_high)
    assert networks_called(recipe) == ["transformer"] * num_high + ["transformer_2"] * (
        4 - num_high
    )


def test_a_step_at_the_boundary_is_the_noisier_networks() -> None:
    grid = Grid(timesteps=(1000.0, 875.0, 500.0), sigmas=(1.0, 0.875, 0.5, 0.0), experts=(0, 0, 1))
    assert networks_called(recipe_of(grid, 0.875)) == ["transformer"] * 2 + ["transformer_2"]


@pytest.mark.parametrize(
    ("timestep", "sigma", "expert"),
    [(900.0, 0.8998, 1), (899.5, 0.9, 0)],
    ids=["rounded up", "rounded down"],
)
def test_a_clock_that_rounds_across_the_boundary_is_counted_by_sigma(
    timestep: float, sigma: float, expert: int
) -> None:
    """Compared with boundary_ratio 0.9 itself, the step would fall to the other network."""
    grid = Grid(
        timesteps=(1000.0, timestep, 500.0), sigmas=(1.0, sigma, 0.5, 0.0), experts=(0, expert, 1)
    )
    recipe = recipe_of(grid, 0.9)
    assert boundary_ratio(recipe) == pytest.approx(0.95 if expert else 0.69975)
    expected = ["transformer", f"transformer{'_2' if expert else ''}", "transformer_2"]
    assert networks_called(recipe) == expected


def test_one_boundary_serves_every_grid() -> None:
    two = Grid(timesteps=(1000.0, 625.0), sigmas=(1.0, 0.625, 0.0), experts=(0, 1))
    four = expert_recipe(WAN22, own_networks=True).grids[0]
    recipe = recipe_of(two, 0.875, four)
    assert networks_called(recipe, 2) == ["transformer", "transformer_2"]
    assert networks_called(recipe, 4) == ["transformer"] * 2 + ["transformer_2"] * 2


def test_grids_made_on_demand_are_divided_by_sigma_too() -> None:
    recipe = replace(
        recipe_of(expert_recipe(WAN22, own_networks=True).grids[0], 0.875), steps="any"
    )
    names = networks_called(recipe, 8)
    grid = recipe.grid(8)
    assert names == [f"transformer{'_2' if index else ''}" for index in grid.experts]
    assert set(names) == {"transformer", "transformer_2"}


def test_experts_out_of_order_are_refused() -> None:
    experts = (
        Expert(adapter="a", sigma_high=1.0, sigma_low=0.9, component="transformer_2"),
        Expert(adapter="b", sigma_high=0.9, sigma_low=0.0, component="transformer"),
    )
    grid = replace(WAN22.recipe().grids[0], experts=(0, 0, 1, 1))
    recipe = replace(WAN22.recipe(), experts=experts, grids=(grid,))
    with pytest.raises(PipelineError, match="no boundary_ratio divides the grids"):
        FewStepPipeline.wrap(WAN22.build(), recipe=recipe)


def test_the_pipelines_own_boundary_comes_back() -> None:
    stock = WAN22.build()
    stock.register_to_config(boundary_ratio=0.5)
    recipe = expert_recipe(WAN22, own_networks=True)
    pipe: Any = FewStepPipeline.wrap(stock, recipe=recipe)
    assert pipe.config.boundary_ratio == recipe.experts[0].sigma_low
    assert pipe.unwrap().config.boundary_ratio == 0.5


def test_a_boundary_changed_afterwards_is_noticed() -> None:
    recipe = expert_recipe(WAN22, own_networks=True)
    pipe: Any = FewStepPipeline.wrap(WAN22.build(), recipe=recipe)
    pipe.register_to_config(boundary_ratio=0.99)
    with pytest.raises(PipelineError, match="boundary_ratio is 0.99, which does not divide the 4"):
        draw(pipe, WAN22)
    check_counts(FewStepPipeline.unwrap(pipe), recipe, recipe.grids[0])


def test_networks_and_recipe_must_belong_together(tmp_path: Path) -> None:
    own, shared = (expert_recipe(WAN22, own_networks=flag) for flag in (True, False))
    with pytest.raises(PipelineError, match="the experts of this recipe share one network, but"):
        FewStepPipeline.wrap(WAN22.build(), recipe=shared)
    with pytest.raises(PipelineError, match="no such second network"):
        FewStepPipeline.wrap(SD3.build(), recipe=replace(own, base=SD3.recipe().base))
    folder, _ = expert_folder(WAN22, tmp_path, own_networks=True)
    with pytest.raises(PipelineError, match="for transformer_2, which WanPipeline was loaded wit"):
        FewStepPipeline.wrap(WAN21.build(), adapter=folder)
    with pytest.raises(PipelineError, match="for transformer_2, which WanPipeline was loaded wit"):
        FewStepPipeline.wrap(WAN21.build(), recipe=own)


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
def test_fuse_merges_both_networks_and_saving_keeps_both(policy: str, tmp_path: Path) -> None:
    """diffusers' own fuse_lora and unload_lora_weights would lose the low-noise expert here."""
    folder, recipe = expert_folder(WAN22, tmp_path / "experts", own_networks=True)
    pipe = FewStepPipeline.wrap(WAN22.build(), adapter=folder, experts=policy)
    picture = draw(pipe, WAN22)
    torch.testing.assert_close(draw(pipe.fuse(), WAN22), picture, rtol=1e-4, atol=1e-4)
    assert all(adapter.is_fused for adapter in pipe.adapters)
    base = WAN22.build()
    files = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    for network, name in files.items():
        deltas = deltas_of(folder / f"{name}.safetensors", network)[network]
        before = base.components[network].state_dict()
        after = pipe.components[network].state_dict()
        assert after.keys() == before.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key] + deltas.get(key, 0.0))
    pipe.save_pretrained(tmp_path / "saved")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "saved", text_encoder=None, tokenizer=None)
    assert stock.config["boundary_ratio"] == recipe.experts[0].sigma_low
    again = FewStepPipeline.from_pretrained(tmp_path / "saved")
    assert again.recipe.experts == recipe.experts
    torch.testing.assert_close(draw(again, WAN22), picture, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_stock_fuse_and_unload_lose_the_low_noise_expert_and_that_is_said(
    policy: str, tmp_path: Path
) -> None:
    """diffusers 0.42: fuse_lora merges `transformer`, unload_lora_weights clears both networks."""
    folder, _ = expert_folder(WAN22, tmp_path, own_networks=True)
    low = WAN22.build().components["transformer_2"].state_dict()
    pipe: Any = FewStepPipeline.wrap(WAN22.build(), adapter=folder, experts=policy)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer_2.state_dict()
    assert all(torch.equal(after[key], low[key]) for key in low)  # nothing of the expert is left
    with pytest.raises(PipelineError, match="was removed from this pipeline .* or fuse"):
        draw(pipe, WAN22)


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
def test_experts_of_one_network_cannot_be_fused_or_saved(policy: str, tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    picture = draw(pipe, SD3)
    with pytest.raises(
        PipelineError, match="share transformer, whose weights can hold one of them"
    ):
        pipe.fuse()
    with pytest.raises(PipelineError, match=r"share transformer.*unwrap\(\) to save the base"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    torch.testing.assert_close(draw(pipe, SD3), picture)


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
@pytest.mark.parametrize(("strength", "calls"), [(1.0, 4), (0.7, 1), (0.9, 3)])
def test_image_to_image_that_starts_late_starts_with_the_expert_of_that_step(
    policy: str, strength: float, calls: int, tmp_path: Path
) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    parts = {name: part for name, part in SD3.build().components.items()}
    stock = diffusers.StableDiffusion3Img2ImgPipeline(**parts)
    pipe: Any = FewStepPipeline.wrap(stock, adapter=folder, experts=policy)
    arguments = SD3.arguments(1)
    size = {key: arguments.pop(key) for key in ("height", "width")}
    image = torch.rand(1, 3, *size.values(), generator=torch.Generator().manual_seed(3))

    def redraw(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(**arguments, image=image, strength=strength, seed=0)[0]

    redraw(pipe)  # ends in the last phase; the next call must go back
    seen = record_denoiser(pipe, SD3)
    ours = redraw(pipe)
    assert len(seen) == calls
    by_hand: Any = FewStepPipeline.wrap(
        diffusers.StableDiffusion3Img2ImgPipeline(**SD3.build().components),
        recipe=SD3.recipe(),
    )
    base = {k: v.clone() for k, v in by_hand.transformer.state_dict().items()}
    files = ["high_noise_model"] * 2 + ["low_noise_model"] * 2
    waiting = files[4 - calls :]

    def set_weights(module: torch.nn.Module, *_: Any) -> None:
        deltas = deltas_of(folder / f"{waiting.pop(0)}.safetensors", "transformer")["transformer"]
        module.load_state_dict({k: v + deltas.get(k, 0.0) for k, v in base.items()})

    by_hand.transformer.register_forward_pre_hook(set_weights)
    torch.testing.assert_close(ours, redraw(by_hand), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
def test_a_pipeline_made_from_a_wrapped_one_switches_too(policy: str, tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    picture = draw(pipe, SD3)
    other = diffusers.StableDiffusion3Pipeline.from_pipe(pipe)
    again = FewStepPipeline.wrap(other)
    assert again.recipe == pipe.recipe
    torch.testing.assert_close(draw(again, SD3), picture)


def test_a_step_count_the_recipe_does_not_have_is_an_error(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    with pytest.raises(RecipeError, match="was not made for 3 steps"):
        draw(FewStepPipeline.wrap(SD3.build(), adapter=folder), SD3, num_inference_steps=3)
