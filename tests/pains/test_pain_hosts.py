"""Pains 11 and 17: compiling with a LoRA on, and saving with a LoRA on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch._dynamo.testing import CompileCounter

from fewstep.doctor import examine
from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import METADATA_KEY
from tests.pains.common import built, drawn, finding, lora_tensors, write_lora
from tests.tiny_pipelines import SD3, SDXL, TinyFamily

OFF = {"guidance_scale": 1.0}
CALL = SDXL.arguments(1) | OFF
STEPS = {"num_inference_steps": 4, **OFF}


def file_for(family: TinyFamily, folder: Path) -> Path:
    component = family.denoisers[0]
    return write_lora(
        folder / "a.safetensors",
        lora_tensors(family.build(), component),
        prefix=f"{component}.",
        metadata={METADATA_KEY: family.recipe().to_json()},
    )


def test_17_a_pipeline_saved_with_its_lora_comes_back_with_random_layers(tmp_path: Path) -> None:
    pipe = built(SDXL)
    file = file_for(SDXL, tmp_path)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="few")
    finding(examine(pipe, recipe=SDXL.recipe(), arguments=CALL), "saving/lora-attached")
    before = drawn(pipe, SDXL, **STEPS)
    pipe.save_pretrained(tmp_path / "stock")
    missing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    back: Any = StableDiffusionXLPipeline.from_pretrained(tmp_path / "stock", **missing)
    back.set_progress_bar_config(disable=True)
    assert not torch.allclose(drawn(back, SDXL, **STEPS), before, atol=1e-3)

    ours = FewStepPipeline.wrap(built(SDXL), adapter=file)
    with pytest.raises(PipelineError, match="do not survive saving"):
        ours.save_pretrained(tmp_path / "ours")
    ours.fuse()
    before = drawn(ours, SDXL)
    ours.save_pretrained(tmp_path / "ours")
    again = FewStepPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(again, SDXL), before)


def test_11_a_lora_loaded_into_a_compiled_network_compiles_it_again(tmp_path: Path) -> None:
    pipe, counter = built(SD3), CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    drawn(pipe, SD3, num_inference_steps=4, **OFF)
    once = counter.frame_count
    assert once > 0
    file = file_for(SD3, tmp_path)
    found = examine(pipe, adapter=file, arguments=SD3.arguments(1) | OFF)
    assert "compiled before its LoRA" in finding(found, "adapter/compiled").sentence
    seen = counter.frame_count
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="few")
    drawn(pipe, SD3, num_inference_steps=4, **OFF)
    assert counter.frame_count > seen
    found = examine(pipe, recipe=SD3.recipe(), arguments=SD3.arguments(1) | OFF)
    assert "attached to the compiled transformer" in finding(found, "adapter/compiled").sentence


def test_11_fused_first_a_network_is_compiled_once_for_all_steps(tmp_path: Path) -> None:
    pipe: Any = FewStepPipeline.wrap(built(SD3), adapter=file_for(SD3, tmp_path)).fuse()
    counter = CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)
    first = drawn(pipe, SD3)
    once = counter.frame_count
    assert torch.equal(drawn(pipe, SD3), first)
    assert counter.frame_count == once
    assert examine(pipe, arguments=SD3.arguments(1)).codes == ()
