"""Pains 9, 10, 15 and 16: LoRA files that load in part, at another scale, into few bits, or not."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.adapters import save_adapter
from fewstep.doctor import examine, examine_adapter
from fewstep.errors import AdapterError
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.lora_layers import lora_layers
from fewstep.recipe import METADATA_KEY, Lora
from tests.pains.common import built, drawn, finding, lora_tensors, write_lora
from tests.tiny_pipelines import SD3, SDXL

STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0}
CALL = SD3.arguments(1) | {"guidance_scale": 1.0}


def layers(pipe: Any, component: str = "transformer") -> dict[str, Any]:
    return dict(lora_layers(pipe.components[component]))


def test_9_diffusers_loads_nothing_of_a_file_and_says_so_in_a_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = built(SD3)
    recipe = {METADATA_KEY: SD3.recipe().to_json()}
    tensors = lora_tensors(pipe, "transformer")
    file = write_lora(
        tmp_path / "a.safetensors", tensors, prefix="base_model.model.", metadata=recipe
    )
    with caplog.at_level(logging.CRITICAL, "diffusers"):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert layers(pipe) == {}

    found = examine(pipe, adapter=file, arguments=CALL)
    assert finding(found, "adapter/stock-loads-less").evidence == {"modules": 2, "loaded": 0}
    assert layers(pipe) == {}  # the doctor took off what it put on
    FewStepPipeline.wrap(pipe, adapter=file)
    assert len(layers(pipe)) == 2


def test_9_a_file_for_another_base_is_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    pipe = built(SD3)
    other = lora_tensors(built(SDXL), "unet")
    file = save_adapter(
        tmp_path / "a.safetensors",
        other,
        recipe=SD3.recipe(),
        rank=2,
        alpha=2.0,
        title="test",
        component="transformer",
    )
    found = examine(pipe, adapter=file, arguments=CALL)
    assert finding(found, "adapter/does-not-fit").severity == "error"
    with pytest.raises(AdapterError):
        FewStepPipeline.wrap(pipe, adapter=file)
    assert layers(pipe) == {}


def test_15_a_scale_that_only_the_readme_tells_is_not_applied(tmp_path: Path) -> None:
    pipe = built(SD3)
    recipe = SD3.recipe(lora=Lora(scale=0.125))
    tensors = lora_tensors(pipe, "transformer")
    file = write_lora(
        tmp_path / "a.safetensors",
        tensors,
        prefix="transformer.",
        metadata={METADATA_KEY: recipe.to_json()},
    )
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="hyper")
    assert {layer.scaling["hyper"] for layer in layers(pipe).values()} == {1.0}

    found = examine(pipe, recipe=recipe, arguments=CALL)
    assert "made for 0.125" in finding(found, "adapter/other-scale").sentence
    pipe.set_adapters("hyper", 0.125)
    assert "adapter/other-scale" not in examine(pipe, recipe=recipe, arguments=CALL).codes
    by_hand = drawn(pipe, SD3, sigmas=[1.0], num_inference_steps=1, guidance_scale=1.0)

    wrapped = FewStepPipeline.wrap(built(SD3), adapter=file)
    assert {layer.scaling["fewstep"] for layer in layers(wrapped).values()} == {0.125}
    FewStepPipeline.unwrap(wrapped)
    lone = examine_adapter(file)
    finding(lone, "adapter/scale-not-in-file")
    assert lone.comfyui is not None
    assert "strength_model 0.125" in lone.comfyui.nodes[0]
    assert torch.isfinite(by_hand).all()


def test_16_alpha_tensors_beside_metadata_are_refused(tmp_path: Path) -> None:
    pipe = built(SDXL)
    tensors = {}
    for name, tensor in lora_tensors(pipe, "unet").items():
        kohya = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        module, matrix, _ = kohya.rsplit(".", 2)
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{flat}.{matrix}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(1.0)
    config = {"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": ["to_q", "to_v"]}
    file = write_lora(
        tmp_path / "a.safetensors",
        tensors,
        prefix="",
        metadata={
            "lora_adapter_metadata": json.dumps(config),
            METADATA_KEY: SDXL.recipe().to_json(),
        },
    )
    with pytest.raises(ValueError, match="network_alphas"):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)

    finding(examine_adapter(file), "adapter/alpha-twice")
    found = examine(pipe, adapter=file, arguments=SDXL.arguments(1) | {"guidance_scale": 1.0})
    finding(found, "adapter/stock-refuses")
    FewStepPipeline.wrap(pipe, adapter=file)
    scales = {layer.scaling["fewstep"] for layer in layers(pipe, "unet").values()}
    assert scales == {0.5}


def test_16_a_field_that_peft_does_not_know_is_a_type_error(tmp_path: Path) -> None:
    pipe = built(SD3)
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,
        "transformer.target_modules": ["to_q", "to_v"],
        "transformer.of_the_future": True,
    }
    file = write_lora(
        tmp_path / "a.safetensors",
        lora_tensors(pipe, "transformer"),
        prefix="transformer.",
        metadata={
            "lora_adapter_metadata": json.dumps(config),
            METADATA_KEY: SD3.recipe().to_json(),
        },
    )
    with pytest.raises(TypeError, match="LoraConfig"):
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name)

    fields = finding(examine_adapter(file), "adapter/metadata-fields").evidence["fields"]
    assert fields == ["of_the_future"]
    FewStepPipeline.wrap(pipe, adapter=file)
    assert len(layers(pipe)) == 2


def test_16_what_we_write_has_no_field_that_needs_a_new_peft(tmp_path: Path) -> None:
    file = save_adapter(
        tmp_path / "a.safetensors",
        lora_tensors(built(SD3), "transformer"),
        recipe=SD3.recipe(),
        rank=2,
        alpha=1.0,
        title="test",
        component="transformer",
    )
    codes = examine_adapter(file).codes
    assert not {"adapter/metadata-fields", "adapter/alpha-twice", "recipe/none"} & set(codes)


def test_10_diffusers_samples_with_an_adapter_that_does_nothing(tmp_path: Path) -> None:
    """What quantised bases do to a LoRA, without a quantiser: those need a GPU."""
    pipe = built(SD3)
    file = write_lora(
        tmp_path / "a.safetensors",
        lora_tensors(pipe, "transformer", strength=0.0),
        prefix="transformer.",
        metadata={METADATA_KEY: SD3.recipe().to_json()},
    )
    plain = drawn(pipe, SD3, **STEPS)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    assert torch.equal(drawn(pipe, SD3, **STEPS), plain)

    found = examine(built(SD3), adapter=file, arguments=CALL)
    assert "has no effect" in finding(found, "adapter/no-effect").sentence


def test_10_a_lora_loaded_after_the_cast_to_eight_bits_is_cast_too(tmp_path: Path) -> None:
    pipe = built(SD3)
    file = write_lora(
        tmp_path / "a.safetensors",
        lora_tensors(pipe, "transformer", strength=1e-3),
        prefix="transformer.",
        metadata={METADATA_KEY: SD3.recipe().to_json()},
    )
    few_bits = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    pipe.transformer.enable_layerwise_casting(**few_bits)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    found = examine(pipe, recipe=SD3.recipe(), arguments=CALL)
    assert finding(found, "adapter/stored-in-few-bits").evidence["dtype"] == "float8_e4m3fn"
    finding(found, "adapter/quantised-base")

    right = FewStepPipeline.wrap(built(SD3), adapter=file)
    right.transformer.enable_layerwise_casting(**few_bits)
    codes = examine(right, arguments=SD3.arguments(1)).codes
    assert codes == ("adapter/quantised-base",)
