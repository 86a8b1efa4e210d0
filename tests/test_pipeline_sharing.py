"""Two wrapped pipelines of other tasks on the same models share one adapter."""

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from tests.expert_files import expert_folder
from tests.tiny.adapters import lora_file
from tests.tiny_pipelines import SD3

IMAGE = torch.rand(1, *SD3.latent_shape, generator=torch.Generator().manual_seed(3))


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**SD3.arguments(1), seed=1)[0]


def redraw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**SD3.arguments(1), image=IMAGE, strength=1.0, seed=1)[0]


def pair(folder: Path) -> tuple[Any, Any]:
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=lora_file(SD3, folder / "lora.safetensors"))
    return pipe, FewStepPipeline.wrap(StableDiffusion3Img2ImgPipeline.from_pipe(pipe))


def test_the_second_pipeline_knows_the_adapter(tmp_path: Path) -> None:
    pipe, other = pair(tmp_path)
    assert other.adapter == pipe.adapter
    assert "adapter   none" not in other.describe()


@pytest.mark.parametrize("first", [0, 1])
def test_the_adapter_stays_until_the_last_one_is_unwrapped(
    tmp_path: Path, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    both, draws = pair(tmp_path), (draw, redraw)
    last = 1 - first
    base = SD3.build().transformer.state_dict()
    expected = draws[last](both[last])
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        both[first].unwrap()
    assert "another wrapped pipeline shares these models" in caplog.text
    assert torch.equal(draws[last](both[last]), expected)
    plain = both[last].unwrap()
    assert sorted(plain.transformer.state_dict()) == sorted(base)
    for name, weight in plain.transformer.state_dict().items():
        assert torch.equal(weight, base[name]), name


def test_a_pipeline_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    pipe, other = pair(tmp_path)
    del other
    gc.collect()
    plain = pipe.unwrap()
    assert not [name for name in plain.transformer.state_dict() if "lora" in name]


def test_fusing_one_fuses_both(tmp_path: Path) -> None:
    pipe, other = pair(tmp_path)
    expected = redraw(other)
    pipe.fuse()
    assert other.adapter is not None
    assert other.adapter.is_fused
    torch.testing.assert_close(redraw(other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
def test_experts_are_shared_too(tmp_path: Path, policy: str) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    other: Any = FewStepPipeline.wrap(StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    expected = draw(pipe)
    other.unwrap()
    assert torch.equal(draw(pipe), expected)


def test_another_recipe_for_experts_that_are_on_is_refused(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder)
    other = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    with pytest.raises(PipelineError, match="whose recipe has other experts"):
        FewStepPipeline.wrap(other, recipe=SD3.recipe())
