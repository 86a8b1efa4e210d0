"""FewStepPipeline: wrapping, adapters, saving, undoing, and the sentences of its errors."""

import copy
import inspect
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline, LCMScheduler

from fewstep.adapters import save_adapter
from fewstep.errors import (
    AdapterError,
    ConfigError,
    PipelineError,
    RecipeError,
    RecipeNotFoundError,
)
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import SIDECAR_NAME, FewStepRecipe, Grid, Lora, Sampler
from fewstep.schedulers import FewStepScheduler
from tests.tiny.adapters import lora_file
from tests.tiny_pipelines import (
    PIXART,
    QWEN_IMAGE,
    SD3,
    SD15,
    SDXL,
    TinyFamily,
    record_denoiser,
    seen_timesteps,
)

# Importing AutoPipeline imports Kolors, which uses torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
LORA_FAMILIES = pytest.mark.parametrize("family", [SD15, SDXL, SD3, PIXART], ids=lambda f: f.name)


def draw(pipe: FewStepPipeline, family: TinyFamily, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**family.arguments(1), seed=0, **kwargs)[0]


def test_a_wrapped_pipeline_stays_what_it_was() -> None:
    stock = SD3.build()
    components = dict(stock.components)
    pipe = FewStepPipeline.wrap(stock, recipe=SD3.recipe())
    assert pipe is stock
    assert isinstance(pipe, FewStepPipeline)
    assert isinstance(pipe, diffusers.StableDiffusion3Pipeline)
    assert type(pipe).__name__ == "StableDiffusion3Pipeline"
    assert type(pipe) is type(FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe()))
    for name, component in pipe.components.items():
        assert component is components[name] or name == "scheduler"


def test_the_call_keeps_its_signature_and_gains_a_seed() -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    ours = list(inspect.signature(type(pipe).__call__).parameters)
    stock = list(inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters)
    assert [name for name in ours if name not in ("seed", "teacher_refine")] == stock
    assert inspect.signature(type(pipe).__call__).parameters["seed"].kind.name == "KEYWORD_ONLY"


@LORA_FAMILIES
def test_an_adapter_is_loaded_whole_and_changes_the_picture(
    family: TinyFamily, tmp_path: Path
) -> None:
    file = lora_file(family, tmp_path / "a.safetensors")
    plain = draw(FewStepPipeline.wrap(family.build(), recipe=family.recipe()), family)
    pipe = FewStepPipeline.wrap(family.build(), adapter=file)
    assert not torch.allclose(draw(pipe, family), plain, atol=1e-3)
    assert pipe.adapter is not None
    assert pipe.adapter.path == file


@LORA_FAMILIES
def test_unwrap_gives_the_stock_pipeline_back(family: TinyFamily, tmp_path: Path) -> None:
    stock = family.build()
    before_class, before_scheduler = type(stock), stock.scheduler
    weights = {k: v.clone() for k, v in stock.components[family.denoisers[0]].state_dict().items()}
    pipe = FewStepPipeline.wrap(stock, adapter=lora_file(family, tmp_path / "a.safetensors"))
    assert any("lora" in k for k in pipe.components[family.denoisers[0]].state_dict())
    back = FewStepPipeline.unwrap(pipe)
    assert back is stock
    assert type(back) is before_class
    assert back.scheduler is before_scheduler
    after = back.components[family.denoisers[0]].state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[k], weights[k]) for k in weights)
    with pytest.raises(PipelineError, match="not wrapped"):
        FewStepPipeline.unwrap(back)  # pyright: ignore[reportArgumentType]


def test_the_scale_is_the_recipes_unless_given(tmp_path: Path) -> None:
    file = lora_file(SD3, tmp_path / "a.safetensors")
    half = replace(SD3.recipe(), lora=Lora(scale=0.5))
    by_recipe = draw(FewStepPipeline.wrap(SD3.build(), adapter=file, recipe=half), SD3)
    by_hand = draw(FewStepPipeline.wrap(SD3.build(), adapter=file, adapter_scale=0.5), SD3)
    whole = draw(FewStepPipeline.wrap(SD3.build(), adapter=file), SD3)
    zero = draw(FewStepPipeline.wrap(SD3.build(), adapter=file, adapter_scale=0.0), SD3)
    base = draw(FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe()), SD3)
    assert torch.equal(by_recipe, by_hand)
    assert not torch.allclose(whole, by_hand, atol=1e-4)
    torch.testing.assert_close(zero, base)


@LORA_FAMILIES
def test_fusing_keeps_the_picture_and_saving_then_works_in_stock_diffusers(
    family: TinyFamily, tmp_path: Path
) -> None:
    pipe = FewStepPipeline.wrap(
        family.build(), adapter=lora_file(family, tmp_path / "a.safetensors")
    )
    picture = draw(pipe, family)
    torch.testing.assert_close(draw(pipe.fuse(), family), picture, rtol=1e-4, atol=1e-4)
    pipe.save_pretrained(tmp_path / "saved")
    absent = {name: None for name, part in family.build().components.items() if part is None}
    stock = DiffusionPipeline.from_pretrained(tmp_path / "saved", **absent)
    assert type(stock) is type(family.build())
    assert type(stock.scheduler).__module__.startswith("diffusers.")
    again = FewStepPipeline.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(draw(again, family), picture, rtol=1e-4, atol=1e-4)


def test_saving_with_lora_layers_is_refused_whoever_attached_them(tmp_path: Path) -> None:
    file = lora_file(SDXL, tmp_path / "a.safetensors")
    ours = FewStepPipeline.wrap(SDXL.build(), adapter=file)
    theirs = FewStepPipeline.wrap(SDXL.build(), recipe=SDXL.recipe())
    theirs.load_lora_weights(str(file))
    for pipe in (ours, theirs):
        with pytest.raises(PipelineError, match="unet has LoRA layers attached.*fuse"):
            pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_saved_pipeline_has_its_recipe_and_loads_without_fewstep(tmp_path: Path) -> None:
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    picture = draw(pipe, SD3)
    pipe.save_pretrained(tmp_path)
    assert "fewstep" not in (tmp_path / "model_index.json").read_text()
    assert FewStepRecipe.from_file(tmp_path / SIDECAR_NAME) == SD3.recipe()
    assert isinstance(pipe.scheduler, FewStepScheduler)  # saving did not undo the wrapping
    torch.testing.assert_close(draw(pipe, SD3), picture)
    torch.testing.assert_close(draw(FewStepPipeline.from_pretrained(tmp_path), SD3), picture)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    auto = diffusers.AutoPipelineForText2Image.from_pretrained(tmp_path, **absent)
    assert type(auto) is diffusers.StableDiffusion3Pipeline


def test_another_task_from_the_same_pipeline_keeps_the_recipe() -> None:
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    original = pipe._fewstep.replaced_scheduler
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is diffusers.StableDiffusion3Img2ImgPipeline
    wrapped = FewStepPipeline.wrap(other)
    assert wrapped.recipe == SD3.recipe()
    assert FewStepPipeline.unwrap(wrapped).scheduler is original


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_are_wrapped_too(clone) -> None:
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    other = clone(pipe)
    assert type(other) is type(pipe)
    assert torch.equal(draw(other, SD3), draw(pipe, SD3))


def test_a_recipe_of_several_grids_is_called_with_a_step_count() -> None:
    two = Grid(timesteps=(1000.0, 625.0), sigmas=(1.0, 0.625, 0.0))
    recipe = replace(SD3.recipe(), grids=(two, SD3.recipe().grids[0]))
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=recipe, steps=2)
    calls = record_denoiser(pipe, SD3)
    draw(pipe, SD3)
    assert seen_timesteps(calls, SD3) == [1000.0, 625.0]
    draw(pipe, SD3, num_inference_steps=4)
    assert len(calls) == 6
    with pytest.raises(RecipeError, match="was not made for 3 steps; use 2, 4"):
        draw(pipe, SD3, num_inference_steps=3)
    with pytest.raises(RecipeError, match="was not made for 8 steps"):
        FewStepPipeline.wrap(SD3.build(), recipe=recipe, steps=8)


def test_text_length_is_the_recipes_unless_given() -> None:
    recipe = replace(SD3.recipe(), base=replace(SD3.recipe().base, max_sequence_length=77))
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=recipe)
    lengths = []
    encode = pipe.encode_prompt

    def watch(*args: object, **kwargs: object):
        lengths.append(kwargs["max_sequence_length"])
        return encode(*args, **kwargs)

    pipe.encode_prompt = watch
    draw(pipe, SD3)
    draw(pipe, SD3, max_sequence_length=32)
    assert lengths == [77, 32]


def test_several_images_of_a_prompt_have_seeds_that_follow() -> None:
    recipe = SD15.recipe(stochasticity=1.0)
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=recipe)
    both = pipe(**SD15.arguments(1), num_images_per_prompt=2, seed=40)[0]
    second = pipe(**SD15.arguments(1), seed=41)[0]
    torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-5)


def test_callbacks_and_tuples_still_work() -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    steps = []

    def callback(pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, kwargs: dict) -> dict:
        steps.append((step, float(timestep)))
        return kwargs

    pipe(**SD15.arguments(1), seed=0, callback_on_step_end=callback, return_dict=False)
    assert steps == [(0, 999.0), (1, 749.0), (2, 499.0), (3, 249.0)]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator were both passed"),
        ({"seed": [1, 2, 3]}, "got 3 seeds for 1 images"),
        ({"seed": [1.7]}, "seed must be a whole number from 0 to .*, got 1.7"),
        ({"seed": [-3]}, "seed must be a whole number from 0 to .*, got -3"),
        ({"seed": "7"}, "seed must be a whole number from 0 to .*, got '7'"),
        ({"timesteps": [999, 1]}, "timesteps was passed, but the recipe owns the grid"),
        ({"sigmas": [1.0, 0.5]}, "sigmas was passed, but the recipe owns the grid"),
    ],
)
def test_calls_that_contradict_themselves_are_errors(kwargs: dict, words: str) -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    with pytest.raises((PipelineError, ConfigError), match=words):
        pipe(**SD15.arguments(1), **kwargs)


def test_a_call_inside_a_call_is_refused_and_the_next_one_draws_as_before() -> None:
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    before = draw(pipe, SD3)
    with pytest.raises(PipelineError, match="in the middle of a picture"):
        draw(pipe, SD3, callback_on_step_end=lambda *_: draw(pipe, SD3))
    assert torch.equal(draw(pipe, SD3), before)


def test_a_wrapped_class_is_not_made_from_another_pipeline() -> None:
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    for wrapped_class in (FewStepPipeline, type(pipe)):
        with pytest.raises(PipelineError, match="use from_pipe of the stock class"):
            wrapped_class.from_pipe(pipe)


def test_a_replaced_scheduler_is_noticed() -> None:
    pipe = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    pipe.scheduler = LCMScheduler()
    with pytest.raises(PipelineError, match="the scheduler was replaced by LCMScheduler"):
        draw(pipe, SD15)


def test_wrapping_twice_is_an_error() -> None:
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    with pytest.raises(PipelineError, match="already wrapped"):
        FewStepPipeline.wrap(pipe, recipe=SD3.recipe())


def test_nothing_says_how_is_an_error_that_leaves_the_pipeline_alone() -> None:
    stock = SD3.build()
    with pytest.raises(RecipeNotFoundError, match="pass recipe="):
        FewStepPipeline.wrap(stock)
    assert type(stock) is diffusers.StableDiffusion3Pipeline
    assert isinstance(stock.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)


def test_an_adapter_of_another_size_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    file = lora_file(SD3, tmp_path / "a.safetensors", width=48)
    stock = SD3.build()
    with pytest.raises(AdapterError, match="none of 2 modules fit this base"):
        FewStepPipeline.wrap(stock, adapter=file)
    assert type(stock) is diffusers.StableDiffusion3Pipeline
    assert not any("lora" in name for name in stock.components["transformer"].state_dict())


def test_an_adapter_for_another_component_is_refused(tmp_path: Path) -> None:
    file = save_adapter(
        tmp_path / "a.safetensors",
        {"x.lora_A.weight": torch.zeros(1, 4), "x.lora_B.weight": torch.zeros(4, 1)},
        recipe=SD3.recipe(),
        rank=1,
        alpha=1.0,
        title="low noise",
        component="transformer_2",
    )
    with pytest.raises(AdapterError, match="modules for transformer_2, but .* goes on transformer"):
        FewStepPipeline.wrap(SD3.build(), adapter=file)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("transformer."),
        lambda name: name.replace("transformer.", "base_model.model.", 1),
        lambda name: (
            "lora_transformer_"
            + name.removeprefix("transformer.").rpartition(".lora_")[0].replace(".", "_")
            + (".lora_down.weight" if ".lora_A" in name else ".lora_up.weight")
        ),
    ],
    ids=["bare", "peft", "kohya"],
)
def test_names_that_diffusers_skips_or_does_not_know_are_loaded_all_the_same(
    rename: Any, tmp_path: Path
) -> None:
    """diffusers' SD3 loader only reads names under "transformer."; it stays silent on the rest."""
    file = lora_file(SD3, tmp_path / "a.safetensors")
    other = tmp_path / "other.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({rename(name): value for name, value in tensors.items()}, other)
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=other, recipe=SD3.recipe())
    assert torch.equal(draw(pipe, SD3), draw(FewStepPipeline.wrap(SD3.build(), adapter=file), SD3))


def test_text_encoder_modules_that_find_no_text_encoder_are_an_error(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(lora_file(SD3, tmp_path / "a.safetensors"))
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors[f"{layer}.lora_A.weight"] = torch.zeros(2, 8)
    tensors[f"{layer}.lora_B.weight"] = torch.zeros(8, 2)
    file = tmp_path / "with_text.safetensors"
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(
        AdapterError, match="for text_encoder, which this pipeline was loaded without"
    ):
        FewStepPipeline.wrap(SD3.build(), adapter=file, recipe=SD3.recipe())


def test_a_style_lora_of_the_users_stays_on(tmp_path: Path) -> None:
    style = lora_file(SD3, tmp_path / "style.safetensors", strength=0.3)
    file = lora_file(SD3, tmp_path / "a.safetensors")
    stock: Any = SD3.build()
    stock.load_lora_weights(str(style), adapter_name="style")
    with warnings.catch_warnings():  # peft asks to take care with two adapters, which is this test
        warnings.simplefilter("ignore", UserWarning)
        pipe: Any = FewStepPipeline.wrap(stock, adapter=file)
    assert pipe.get_active_adapters() == ["style", "fewstep"]
    both = draw(pipe, SD3)
    assert not torch.allclose(both, draw(FewStepPipeline.wrap(SD3.build(), adapter=file), SD3))
    back: Any = pipe.unwrap()
    assert back.get_active_adapters() == ["style"]


@pytest.mark.parametrize("family", [SD15, PIXART], ids=lambda family: family.name)
def test_fused_weights_are_base_plus_scale_times_up_times_down(
    family: TinyFamily, tmp_path: Path
) -> None:
    file = lora_file(family, tmp_path / "a.safetensors")
    pipe = FewStepPipeline.wrap(family.build(), adapter=file, adapter_scale=0.5).fuse()
    name = family.denoisers[0]
    base = family.build().components[name].state_dict()
    fused = pipe.components[name].state_dict()
    tensors = safetensors.torch.load_file(file)
    changed = 0
    for key, weight in base.items():
        down = tensors.get(f"{name}.{key.removesuffix('weight')}lora_A.weight")
        if down is not None:
            up = tensors[f"{name}.{key.removesuffix('weight')}lora_B.weight"]
            weight = weight + 0.5 * up @ down
            changed += 1
        torch.testing.assert_close(fused[key], weight)
    assert changed == len(tensors) // 2


def test_an_adapter_scale_without_an_adapter_is_an_error() -> None:
    with pytest.raises(PipelineError, match="adapter_scale was passed without an adapter"):
        FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe(), adapter_scale=0.5)


def test_fusing_without_an_adapter_is_an_error() -> None:
    pipe = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    with pytest.raises(PipelineError, match="no unfused adapter"):
        pipe.fuse()


def test_stock_diffusers_with_our_scheduler_draws_our_picture(tmp_path: Path) -> None:
    """The adapter file is a plain diffusers LoRA: load_lora_weights and the grid are enough."""
    recipe = replace(SD3.recipe(), sampler=Sampler(stochasticity=0.0))
    file = lora_file(SD3, tmp_path / "a.safetensors", recipe=recipe)
    ours = draw(FewStepPipeline.wrap(SD3.build(), adapter=file), SD3)
    stock: Any = SD3.build()
    stock.load_lora_weights(str(file))
    stock.scheduler = FewStepScheduler(recipe)
    generator = torch.Generator().manual_seed(0)
    arguments = {**SD3.arguments(1), "guidance_scale": 1.0, "generator": generator}
    picture = stock(**arguments, num_inference_steps=4)[0]
    torch.testing.assert_close(picture, ours)


def test_describe_says_everything_that_decides_the_picture(tmp_path: Path) -> None:
    recipe = QWEN_IMAGE.recipe(stochasticity=1.0)
    text = FewStepPipeline.wrap(QWEN_IMAGE.build(), recipe=recipe).describe()
    for part in (
        "QwenImagePipeline",
        "qwen-image",
        "from the recipe argument",
        "937.50   0.93750",
        "4 network evaluations",
        "none: true_cfg_scale=1",
        "a negative prompt has no effect",
        "re-noising",
        "one CPU stream per image",
    ):
        assert part in text, part
    file = lora_file(SD3, tmp_path / "a.safetensors")
    text = FewStepPipeline.wrap(SD3.build(), adapter=file, adapter_scale=0.8).describe()
    assert "a.safetensors at scale 0.8" in text
    assert f"'fewstep.recipe' in the metadata of {file}" in text
