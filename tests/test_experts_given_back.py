"""What `unwrap` gives back after diffusers' own merging, and what a failed wrapping leaves."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from tests.expert_files import draw, expert_file, expert_folder
from tests.test_experts import assert_same_state, load_style, state_of
from tests.tiny_pipelines import SD3, WAN22


def single(tmp_path: Path, policy: str) -> Any:
    file = expert_file(SD3, tmp_path / "a.safetensors", seed=1)
    return FewStepPipeline.wrap(SD3.build(), adapter=file, experts=policy)


@pytest.mark.parametrize("is_unloaded", [False, True])
@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_an_adapter_merged_by_fuse_lora_stays_and_that_is_logged(
    policy: str, is_unloaded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = single(tmp_path, policy)
    pipe.fuse_lora()
    if is_unloaded:
        pipe.unload_lora_weights()
    with caplog.at_level(logging.WARNING):
        pipe.unwrap()
    assert "was merged into the weights by fuse_lora() and stays there" in caplog.text
    assert not any("lora" in key for key in pipe.transformer.state_dict())


@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_unfused_before_unwrapping_nothing_stays_and_nothing_is_logged(
    policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = SD3.build().transformer.state_dict()
    pipe = single(tmp_path, policy)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    with caplog.at_level(logging.WARNING):
        pipe.unwrap()
    assert not caplog.records
    torch.testing.assert_close(pipe.transformer.state_dict(), before, rtol=1e-5, atol=1e-6)


def test_a_style_merged_into_exchanged_weights_must_be_unmerged_first(tmp_path: Path) -> None:
    """Else unfuse_lora() would later take it out of the base's own weights."""
    stock = SD3.build()
    before = state_of(stock, SD3)
    file = expert_file(SD3, tmp_path / "a.safetensors", seed=1)
    pipe: Any = FewStepPipeline.wrap(stock, adapter=file, experts="fused")
    load_style(pipe, expert_file(SD3, tmp_path / "style.safetensors", seed=5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pipe.fuse_lora()
    with pytest.raises(PipelineError, match=r"call unfuse_lora\(\) first"):
        pipe.unwrap()
    assert isinstance(pipe, FewStepPipeline)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_same_state(pipe.unwrap(), SD3, before)


def test_weights_that_cannot_be_exchanged_leave_the_other_network_alone(tmp_path: Path) -> None:
    folder, _ = expert_folder(WAN22, tmp_path, own_networks=True)
    stock: Any = WAN22.build()
    for name, module in stock.transformer_2.named_modules():
        if name.endswith("to_q"):
            whole = (50 * module.weight).to(torch.int8)
            module.weight = nn.Parameter(whole, requires_grad=False)
    before = state_of(stock, WAN22)
    with pytest.raises(PipelineError, match="is quantised"):
        FewStepPipeline.wrap(stock, adapter=folder, experts="fused")
    assert_same_state(stock, WAN22, before)


def test_a_pipeline_of_another_task_survives_an_error_in_a_callback(tmp_path: Path) -> None:
    """Experts on shared models: whoever draws next starts with the expert of its own first step."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    folder, _ = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts="fused")
    other: Any = FewStepPipeline.wrap(StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    other.set_progress_bar_config(disable=True)
    expected = draw(pipe, SD3)

    def fails(*_: Any) -> dict[str, Any]:
        raise KeyError("callback")

    image = torch.rand(1, *SD3.latent_shape, generator=torch.Generator().manual_seed(3))
    with pytest.raises(KeyError, match="callback"):
        other(**SD3.arguments(1), image=image, strength=0.5, seed=1, callback_on_step_end=fails)
    assert torch.equal(draw(pipe, SD3), expected)
