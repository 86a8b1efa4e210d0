"""Checkpoints in one file, and recipes that pipelines carry in their own configs."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fewstep.errors import AdapterError, PipelineError, RecipeError, RecipeNotFoundError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.config_recipes import recipe_from_config, recipe_of_folder
from fewstep.pipeline.single_file import load_single_file
from fewstep.recipe import METADATA_KEY, SIDECAR_NAME, FewStepRecipe
from fewstep.schedulers import FewStepScheduler
from tests.tiny.adapters import lora_file
from tests.tiny.distilled import FLUX2_KLEIN, build_flux2_klein
from tests.tiny.families import SD15
from tests.tiny.family import record_denoiser, seen_timesteps
from tests.tiny.recipes import VP_GRID

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
PLACES = {  # the tiny UNet's modules in the names of the original code
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ABSENT: dict[str, Any] = dict.fromkeys(
    ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
)


def original_names(unet: nn.Module) -> dict[str, Tensor]:
    """The UNet's weights as Stable Diffusion's own code names them."""
    tensors = {}
    for name, weight in unet.state_dict().items():
        place = max((p for p in PLACES if name.startswith(f"{p}.")), key=len)
        rest = name.removeprefix(f"{place}.")
        part, _, kind = rest.rpartition(".")
        part = RESNET.get(part, part) if ".resnets." in place else part
        tail = f"{part}.{kind}" if part else kind
        tensors[f"model.diffusion_model.{PLACES[place]}.{tail}"] = weight.clone()
    return tensors


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A diffusers folder of the same kind of model, for the configs alone."""
    SD15.build().save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def checkpoint(path: Path, recipe: FewStepRecipe | None = None) -> Path:
    metadata = None if recipe is None else {METADATA_KEY: recipe.to_json()}
    tensors = original_names(SD15.build().components["unet"])
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def load(path: Path, config: Path, **kwargs: Any) -> FewStepPipeline:
    vae = SD15.build().components["vae"]
    pipe = FewStepPipeline.from_single_file(
        path, config=str(config), vae=vae, **ABSENT, requires_safety_checker=False, **kwargs
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_checkpoint_that_carries_its_recipe_is_sampled_by_it(
    tmp_path: Path, config: Path
) -> None:
    """diffusers alone would give it the base's scheduler and 50 steps: noise or a burnt picture."""
    file = checkpoint(tmp_path / "student.safetensors", SD15.recipe())
    pipe = load(file, config)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert isinstance(pipe.scheduler, FewStepScheduler)
    assert f"from the metadata of {file}" in pipe.describe()
    calls = record_denoiser(pipe, SD15)
    picture = pipe(**SD15.arguments(1), seed=0)[0]
    assert seen_timesteps(calls, SD15) == pytest.approx(VP_GRID)
    whole = FewStepPipeline.wrap(SD15.build(), recipe=SD15.recipe())
    torch.testing.assert_close(picture, whole(**SD15.arguments(1), seed=0)[0])


def test_a_recipe_beside_the_checkpoint_is_found(tmp_path: Path, config: Path) -> None:
    file = checkpoint(tmp_path / "student.safetensors")
    (tmp_path / SIDECAR_NAME).write_text(SD15.recipe().to_json())
    assert load(file, config).recipe == SD15.recipe()


def test_an_adapter_goes_on_a_checkpoint(tmp_path: Path, config: Path) -> None:
    file = checkpoint(tmp_path / "base.safetensors")
    adapter = lora_file(SD15, tmp_path / "a.safetensors")
    picture = load(file, config, adapter=adapter)(**SD15.arguments(1), seed=0)[0]
    whole = FewStepPipeline.wrap(SD15.build(), adapter=adapter)
    torch.testing.assert_close(picture, whole(**SD15.arguments(1), seed=0)[0])


def test_a_checkpoint_that_says_nothing_is_an_error_before_it_is_loaded(
    tmp_path: Path, config: Path
) -> None:
    with pytest.raises(RecipeNotFoundError, match="nothing says how this model wants"):
        load(checkpoint(tmp_path / "base.safetensors"), config)


def test_the_kind_of_model_is_told_from_the_tensors(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="there is no such file"):
        FewStepPipeline.from_single_file(tmp_path / "missing.safetensors", recipe=SD15.recipe())
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(PipelineError, match="its tensors tell no known kind of model"):
        FewStepPipeline.from_single_file(other, recipe=SD15.recipe())
    with pytest.raises(PipelineError, match="cannot load PixArtAlphaPipeline from"):
        load_single_file(other, pipeline_class=diffusers.PixArtAlphaPipeline)
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 4)
    with pytest.raises(AdapterError):
        FewStepPipeline.from_single_file(tmp_path / "torn.safetensors", recipe=SD15.recipe())


# --- recipes in configs


def test_cosmos_sigmas_are_shifted_as_its_scheduler_shifts_them() -> None:
    recipe = recipe_from_config(
        "Cosmos3OmniModularPipeline", {"distilled_sigmas": [1.0, 0.75, 0.5, 0.25]}, {"shift": 5.0}
    )
    assert recipe is not None
    assert recipe.grids[0].sigmas == pytest.approx([1.0, 0.9375, 2.5 / 3.0, 0.625, 0.0])
    assert recipe.base.family == "cosmos3"
    assert recipe.guidance.mode == "none"
    assert recipe.steps == "strict"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(
        FewStepScheduler(recipe).timesteps, scheduler.timesteps, rtol=1e-5, atol=1e-3
    )


def test_qwen_turbo_sigmas_follow_the_size() -> None:
    values = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256}
    recipe = recipe_from_config(
        "QwenImage21Pipeline",
        {"sample_sigmas": [1.0, 0.8, 0.4]},
        {**values, "max_image_seq_len": 8192, "use_dynamic_shifting": True},
    )
    assert recipe is not None
    assert recipe.base.family == "qwen-image-2.1"
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(
        **values, max_image_seq_len=8192, use_dynamic_shifting=True
    )
    scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.4], mu=0.7)
    ours = FewStepScheduler(recipe)
    ours.set_timesteps(mu=0.7)
    torch.testing.assert_close(ours.timesteps, scheduler.timesteps, rtol=1e-5, atol=1e-3)


def test_krea_is_shifted_by_its_fixed_mu() -> None:
    recipe = recipe_from_config("Krea2Pipeline", {"is_distilled": True}, {})
    assert recipe is not None
    published = [1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0]
    assert recipe.grids[0].sigmas == pytest.approx(published, abs=5e-5)


def test_klein_needs_no_recipe_of_ours(tmp_path: Path) -> None:
    pipe = FewStepPipeline.wrap(build_flux2_klein())
    assert "from the pipeline's own config" in pipe.describe()
    calls = record_denoiser(pipe, FLUX2_KLEIN)
    pipe(**FLUX2_KLEIN.arguments(1), seed=0)
    shift = pipe.recipe.resolution_shift
    assert shift is not None
    exp_mu = math.exp(shift.mu(64, 4))
    expected = [1000.0 * exp_mu / (exp_mu + 4.0 / k - 1.0) for k in (4, 3, 2, 1)]
    assert seen_timesteps(calls, FLUX2_KLEIN) == pytest.approx(expected, rel=1e-5)
    build_flux2_klein().save_pretrained(tmp_path)
    found = recipe_of_folder(tmp_path)
    assert found is not None
    assert found.recipe == pipe.recipe
    loaded = FewStepPipeline.from_pretrained(tmp_path)
    assert loaded.recipe == pipe.recipe


@pytest.mark.parametrize(
    ("class_name", "config"),
    [("Flux2KleinPipeline", {"is_distilled": False}), ("FluxPipeline", {}), ("HeliosPipeline", {})],
)
def test_other_configs_say_nothing(class_name: str, config: dict[str, Any]) -> None:
    assert recipe_from_config(class_name, config, {}) is None


def test_configs_a_recipe_cannot_hold_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="wanted a list of numbers"):
        recipe_from_config("QwenImage21Pipeline", {"sample_sigmas": "1, 0.5"}, {})
    with pytest.raises(RecipeError, match="stretches its grid"):
        recipe_from_config(
            "QwenImage21Pipeline", {"sample_sigmas": [1.0, 0.5]}, {"shift_terminal": 0.02}
        )
    (tmp_path / "model_index.json").write_text("{not json")
    assert recipe_of_folder(tmp_path) is None
    (tmp_path / "model_index.json").write_text(json.dumps(["a list"]))
    assert recipe_of_folder(tmp_path) is None


def test_a_config_is_only_looked_into_where_nothing_before_it_says_how(tmp_path: Path) -> None:
    build_flux2_klein().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "sample_sigmas": "not a list"}))
    with pytest.raises(RecipeError, match="wanted a list of numbers"):
        FewStepPipeline.from_pretrained(tmp_path)
    shift = FLUX2_KLEIN.recipe()
    assert FewStepPipeline.from_pretrained(tmp_path, recipe=shift).recipe == shift
