"""The doctor: what it finds, what it leaves alone, and that it puts everything back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.doctor import examine, examine_adapter
from fewstep.doctor.dtype import TimestepRounded
from fewstep.doctor.examination import CHECKS
from fewstep.doctor.report import to_text
from fewstep.doctor.seen import SeenRun, SeenStep
from fewstep.doctor.subject import Subject
from fewstep.errors import AdapterError, RecipeError
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import METADATA_KEY, FewStepRecipe, ResolutionShift, Sampler
from fewstep.schedulers import FewStepScheduler
from tests.pains.common import built, drawn, finding, lora_tensors, write_lora
from tests.tiny_pipelines import (
    ALL_FAMILIES,
    FLUX,
    PIXART,
    SD3,
    SD15,
    SDXL,
    VP_GRID,
    WAN21,
    TinyFamily,
    stock,
)

OFF = {"guidance_scale": 1.0}


def lora_file(
    path: Path, family: TinyFamily = SD3, recipe: FewStepRecipe | None = None, **changes: Any
) -> Path:
    component = family.denoisers[0]
    metadata = {} if recipe is None else {METADATA_KEY: recipe.to_json()}
    tensors = lora_tensors(family.build(), component, **changes)
    return write_lora(path, tensors, prefix=f"{component}.", metadata=metadata)


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
def test_a_pipeline_under_its_recipe_is_healthy(family: TinyFamily) -> None:
    pipe = FewStepPipeline.wrap(family.build(), recipe=family.recipe())
    assert examine(pipe, arguments=family.arguments(1)).codes == ()


def test_everything_is_put_back(tmp_path: Path) -> None:
    pipe = built(SD3)
    style = lora_file(tmp_path / "style.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name=style.name, adapter_name="style")
    few = lora_file(tmp_path / "few.safetensors", recipe=SD3.recipe(), strength=0.1)
    call = {"num_inference_steps": 4, **OFF}
    before, parts, kind = drawn(pipe, SD3, **call), dict(pipe.components), type(pipe)
    examine(pipe, adapter=few, arguments=SD3.arguments(1) | OFF)
    assert type(pipe) is kind
    assert dict(pipe.components) == parts
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    assert torch.equal(drawn(pipe, SD3, **call), before)


def test_the_two_runs_and_the_trained_grid_stand_side_by_side() -> None:
    pipe = built(WAN21, "FlowMatchEulerDiscreteScheduler", shift=5.0)
    found = examine(pipe, recipe=WAN21.recipe(), arguments=WAN21.arguments(1) | OFF)
    lines = to_text(found).splitlines()
    header = next(line for line in lines if line.startswith("step"))
    assert header.split() == ["step", "trained", "as", "called", "with", "fewstep"]
    last = next(line for line in lines if line.startswith("   4"))
    assert last.split() == ["4", "625.00", "0.6250", "24.41", "0.0244", "625.00", "0.6250"]
    assert max(map(len, lines)) <= 100
    assert "  ManualSigmas: 1, 0.9375, 0.833333, 0.625, 0 (the same)" in lines


def test_a_diagnosis_is_json_with_the_worst_finding_first() -> None:
    pipe = built(SDXL, "LCMScheduler", timestep_spacing="trailing")
    found = examine(pipe, recipe=SDXL.recipe(), arguments=SDXL.arguments(1) | OFF)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    severities = [one["severity"] for one in data["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert {"error", "note"} <= set(severities)
    assert data["has_errors"]
    assert data["as_called"]["steps"][1]["timestep"] == 759
    assert data["comfyui"]["sigmas"][-1] == 0


def test_without_a_recipe_only_what_is_wrong_for_any_few_step_model_is_said() -> None:
    pipe = built(SDXL, "EulerDiscreteScheduler", timestep_spacing="trailing")
    few = examine(pipe, arguments=SDXL.arguments(1) | OFF, steps=4)
    many = examine(pipe, arguments=SDXL.arguments(1) | OFF, steps=50)
    assert few.codes == ("recipe/none",)
    assert few.findings[0].severity == "note"
    assert many.codes == ()


def test_a_lora_nobody_knows_is_named_with_the_zoos_guesses(tmp_path: Path) -> None:
    file = lora_file(tmp_path / "Hyper-SDXL-4step-lora-copy.safetensors", SDXL)
    found = finding(examine_adapter(file), "recipe/none")
    assert found.severity == "error"
    assert "zoo:hyper-sdxl-4steps-lora" in found.sentence
    assert "fewstep zoo search" in found.fix


def test_a_recipe_of_the_zoo_that_nobody_verified_is_marked(tmp_path: Path) -> None:
    file = lora_file(tmp_path / "Hyper-SD15-4steps-lora.safetensors", SD15)
    found = examine_adapter(file)
    assert found.recipe_source is not None
    assert "zoo" in found.recipe_source
    assert finding(found, "recipe/unverified").severity == "note"


def test_what_a_recipe_asks_and_a_pipeline_cannot_do_is_said() -> None:
    found = examine(built(SD3), recipe=SDXL.recipe(), arguments=SD3.arguments(1) | OFF)
    assert "samples sd3" in finding(found, "recipe/not-served").sentence
    odd = replace(SD3.recipe(), sampler=Sampler(kind="flow_map"))
    found = examine(built(SD3), recipe=odd, arguments=SD3.arguments(1) | OFF)
    assert "flow_map" in finding(found, "recipe/not-served").sentence
    assert "of the kind flow_map" in finding(found, "comfyui/no-sampler").sentence


def test_a_call_that_fails_is_a_finding_too() -> None:
    found = examine(built(SD3), recipe=SD3.recipe(), arguments={"height": 33, "width": 32})
    assert "divisible by" in finding(found, "pipeline/call-failed").sentence


def test_a_step_count_the_model_was_not_made_for_is_said_not_raised() -> None:
    found = examine(built(SD3), recipe=SD3.recipe(), steps=3, arguments=SD3.arguments(1) | OFF)
    finding(found, "grid/wrong-step-count")
    assert "not made for 3 steps" in finding(found, "recipe/not-served").sentence


def test_a_switched_off_lora_has_no_effect_and_is_named(tmp_path: Path) -> None:
    pipe = built(SD3)
    file = lora_file(tmp_path / "a.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="few")
    pipe.disable_lora()
    found = examine(pipe, recipe=SD3.recipe(), arguments=SD3.arguments(1) | OFF)
    finding(found, "adapter/inactive")


def test_a_scheduler_of_ones_own_cannot_be_loaded_from_the_hub() -> None:
    pipe = built(SD3)
    pipe.scheduler = FewStepScheduler(SD3.recipe())
    found = examine(pipe, arguments=SD3.arguments(1) | OFF)
    assert finding(found, "saving/foreign-scheduler").severity == "warning"


@pytest.mark.parametrize("size", [1.0, 3e4])
def test_a_vae_that_overflows_in_float16_is_found_by_decoding(size: float) -> None:
    pipe = built(SDXL)
    torch.manual_seed(0)
    config = {k: v for k, v in pipe.vae.config.items() if not k.startswith("_")}
    config |= {"scaling_factor": 0.13025, "force_upcast": False}
    pipe.vae = stock.AutoencoderKL(**config)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(size)
    pipe.vae.to(torch.float16)
    found = examine(pipe, arguments=SDXL.arguments(1) | OFF, steps=4)
    assert ("dtype/vae-overflow" in found.codes) == (size > 1.0)


def test_a_network_that_answers_nan_is_named() -> None:
    pipe = built(SD3)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(torch.nan)
    found = examine(pipe, arguments=SD3.arguments(1) | OFF, steps=2)
    assert "transformer answers NaN" in finding(found, "dtype/network-not-finite").sentence


def test_a_timestep_rounded_on_its_way_is_lost_to_a_stock_scheduler() -> None:
    scheduler = stock.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    rounded = scheduler.timesteps[1].bfloat16()
    with pytest.raises(IndexError):
        scheduler.index_for_timestep(rounded)
    assert FewStepScheduler(SD3.recipe()).index_for_timestep(torch.tensor(937.5).bfloat16()) == 1
    step = SeenStep((), float(rounded), False, 0.9, 64, 1.0)
    subject = Subject(as_called=SeenRun(type(scheduler).__name__, 1, (step,)))
    found = TimestepRounded().examine(subject)
    assert found is not None
    assert f"{float(rounded):g}" in found.sentence


def test_pipelines_without_a_lora_loader_are_examined_with_an_adapter(tmp_path: Path) -> None:
    recipe = PIXART.recipe()
    file = lora_file(tmp_path / "a.safetensors", PIXART, recipe)
    found = examine(built(PIXART), adapter=file, arguments=PIXART.arguments(1) | OFF)
    assert found.with_fewstep is not None
    assert found.with_fewstep.timesteps == VP_GRID
    assert not {"adapter/stock-loads-less", "adapter/does-not-fit"} & set(found.codes)


def test_the_guidance_a_class_embeds_is_part_of_a_healthy_call() -> None:
    found = examine(built(FLUX), recipe=FLUX.recipe(), arguments=FLUX.arguments(1) | OFF)
    assert "guidance/other-scale" not in found.codes


def test_a_grid_that_depends_on_the_size_is_shown_as_it_is_for_this_size() -> None:
    shift = ResolutionShift(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)
    recipe = replace(FLUX.recipe(timesteps=(1000.0, 750.0, 500.0, 250.0)), resolution_shift=shift)
    pipe = built(FLUX, "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    found = examine(pipe, recipe=recipe, arguments=FLUX.arguments(1) | OFF)
    assert found.as_called is not None
    assert found.with_fewstep is not None
    assert found.as_called.timesteps == pytest.approx(found.with_fewstep.timesteps)
    assert [t for t, _ in found.trained] == pytest.approx(found.as_called.timesteps)
    assert found.trained[1][0] != 750.0
    assert "grid/not-trained" not in found.codes


def test_missing_files_are_errors_not_findings(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        examine_adapter(tmp_path / "none.safetensors")
    file = lora_file(tmp_path / "a.safetensors", recipe=SD3.recipe())
    with pytest.raises(RecipeError, match="not made for 3 steps"):
        examine_adapter(file, steps=3)
    with pytest.raises(RecipeError, match="no such recipe file"):
        examine(built(SD3), recipe=tmp_path / "none.json")


def test_no_check_finds_anything_where_nothing_is_known() -> None:
    assert [check.examine(Subject()) for check in CHECKS] == [None] * len(CHECKS)
