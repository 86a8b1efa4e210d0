"""Pipelines and adapters that the zoo knows draw without being told how."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from fewstep.errors import RecipeError
from fewstep.pipeline import FewStepPipeline
from fewstep.zoo import entry
from tests.tiny_pipelines import SDXL, Z_IMAGE, TinyFamily, record_denoiser, seen_timesteps

# Importing AutoPipeline imports Kolors, which uses torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def bare_lora(path: Path) -> Path:
    """An SDXL LoRA without any metadata, in a folder of its own."""
    unet = SDXL.build().components["unet"]
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in unet.named_modules():
        if name.endswith("to_q"):
            shapes = {"A": (2, module.in_features), "B": (module.out_features, 2)}
            for half, shape in shapes.items():
                values = torch.randn(shape, generator=generator)
                tensors[f"unet.{name}.lora_{half}.weight"] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("family", "repository", "name"),
    [
        (SDXL, "stabilityai/sdxl-turbo", "sdxl-turbo"),
        (Z_IMAGE, "Tongyi-MAI/Z-Image-Turbo", "z-image-turbo"),
    ],
    ids=["sdxl-turbo", "z-image-turbo"],
)
def test_a_checkpoint_of_the_zoo_is_sampled_as_it_wants(
    family: TinyFamily, repository: str, name: str
) -> None:
    stock = family.build()
    stock.register_to_config(_name_or_path=repository)
    pipe = FewStepPipeline.wrap(stock)
    recipe = entry(name).required_recipe()
    assert pipe.recipe == recipe
    assert f"zoo:{name}" in pipe.describe()
    calls = record_denoiser(pipe, family)
    pipe(**family.arguments(1), seed=0)
    assert seen_timesteps(calls, family) == pytest.approx(recipe.grid().timesteps, rel=1 / 128)


def test_an_adapter_from_a_known_repository_needs_no_recipe(tmp_path: Path) -> None:
    file = bare_lora(tmp_path / "ByteDance/SDXL-Lightning/sdxl_lightning_4step_lora.safetensors")
    pipe = FewStepPipeline.wrap(SDXL.build(), adapter=file)
    assert pipe.recipe == entry("sdxl-lightning-4step-lora").recipe
    calls = record_denoiser(pipe, SDXL)
    pipe(**SDXL.arguments(1), seed=0)
    assert seen_timesteps(calls, SDXL) == [999.0, 749.0, 499.0, 249.0]


def test_a_copy_is_told_by_name_and_a_warning_points_at_the_caller(tmp_path: Path) -> None:
    file = bare_lora(tmp_path / "dmd2_sdxl_4step_lora_fp16.safetensors")
    with pytest.warns(UserWarning, match="by its file name alone") as caught:
        pipe = FewStepPipeline.wrap(SDXL.build(), adapter=file)
    assert pipe.recipe == entry("dmd2-sdxl-4step-lora").recipe
    assert Path(caught[0].filename) == Path(__file__)


def test_a_renamed_copy_takes_the_entry_by_argument(tmp_path: Path) -> None:
    file = bare_lora(tmp_path / "mine.safetensors")
    pipe = FewStepPipeline.wrap(SDXL.build(), adapter=file, recipe="zoo:dmd2-sdxl-4step-lora")
    assert pipe.recipe == entry("dmd2-sdxl-4step-lora").recipe


def test_an_unverified_entry_warns_where_it_is_used() -> None:
    with pytest.warns(UserWarning, match="zoo:sd-turbo is unverified") as caught:
        with pytest.raises(ValueError, match="sd2"):  # the tiny pipeline is SDXL
            FewStepPipeline.wrap(SDXL.build(), recipe="zoo:sd-turbo")
    assert Path(caught[0].filename) == Path(__file__)


def test_a_refused_entry_leaves_the_pipeline_alone() -> None:
    stock = SDXL.build()
    before = stock.scheduler
    with pytest.raises(
        RecipeError, match="zoo:instaflow-0.9b .* use diffusers' community pipeline"
    ):
        FewStepPipeline.wrap(stock, recipe="zoo:instaflow-0.9b")
    assert stock.scheduler is before
    assert not isinstance(stock, FewStepPipeline)
