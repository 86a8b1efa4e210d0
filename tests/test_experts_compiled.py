"""Switching experts under torch.compile and offloading."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline import FewStepPipeline
from tests.expert_files import assert_same_picture, draw, expert_file, expert_folder, expert_recipe
from tests.tiny_pipelines import SD3, SD15, TinyFamily


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(family: TinyFamily, policy: str, folder: Path) -> Any:
    torch._dynamo.reset()
    counters.clear()
    pipe: Any = FewStepPipeline.wrap(family.build(), adapter=folder, experts=policy)
    name = family.denoisers[0]
    setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))
    return pipe


@pytest.mark.parametrize("policy", ["hotswap", "fused"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(SD15, marks=pytest.mark.slow), SD3],
    ids=lambda family: family.name,
)
def test_a_compiled_network_is_compiled_once_for_all_experts(
    family: TinyFamily, policy: str, tmp_path: Path
) -> None:
    """Other ranks, alphas and layers per expert; fixed shapes; graphs are counted, not guessed."""
    folder, _ = expert_folder(family, tmp_path)
    plain = draw(FewStepPipeline.wrap(family.build(), adapter=folder), family)
    pipe = compiled(family, policy, folder)
    seen: list[int] = []
    pipe.components[family.denoisers[0]].register_forward_hook(lambda *_: seen.append(graphs()))
    pictures = [draw(pipe, family) for _ in range(2)]
    assert len(seen) == 8
    assert seen[0] > 0
    assert set(seen) == {seen[0]}  # nothing was compiled after the first call of the first image
    for picture in pictures:
        assert_same_picture(picture, plain)


def test_adapters_cost_a_compilation_per_expert_and_none_after_the_first_image(
    tmp_path: Path,
) -> None:
    """Why the other policies exist: dynamo guards on which adapter is active."""
    folder, _ = expert_folder(SD3, tmp_path)
    pipe = compiled(SD3, "adapters", folder)
    draw(pipe, SD3)
    first = graphs()
    draw(pipe, SD3)
    assert graphs() == first
    once = compiled(SD3, "hotswap", folder)
    draw(once, SD3)
    assert first > graphs()


def test_a_pipeline_compiled_before_wrapping_is_served_too(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    expected = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder), SD3)
    torch._dynamo.reset()
    stock: Any = SD3.build()
    stock.transformer = torch.compile(stock.transformer, backend="eager")
    pipe = FewStepPipeline.wrap(stock, adapter=folder, experts="hotswap")
    assert_same_picture(draw(pipe, SD3), expected)


def test_a_step_that_keeps_the_expert_copies_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies per image: into the second phase, and back for the next image."""
    folder, _ = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts="hotswap")
    copies: list[int] = []
    copy_all = torch._foreach_copy_

    def counted(slots: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        copies.append(len(slots))
        copy_all(slots, values)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    seen: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(len(copies)))
    draw(pipe, SD3)
    draw(pipe, SD3)
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(copies) == {2 * 3}  # down and up of to_q, to_v and to_k


@pytest.mark.parametrize("policy", ["fused", "hotswap"])
def test_weights_that_offloading_keeps_elsewhere_are_not_written(
    policy: str, tmp_path: Path
) -> None:
    """What is written would be lost: group offloading restores its own copies."""
    folder, _ = expert_folder(SD3, tmp_path)
    stock: Any = SD3.build()
    device = torch.device("cpu")
    stock.transformer.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="leaf_level"
    )
    with pytest.raises(PipelineError, match='group offloading keeps .*; use experts="adapters"'):
        FewStepPipeline.wrap(stock, adapter=folder, experts=policy)
    later: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    later.transformer.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="leaf_level"
    )
    with pytest.raises(PipelineError, match="group offloading keeps"):
        draw(later, SD3)


def test_adapters_go_with_group_offloading(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    expected = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder), SD3)
    stock: Any = SD3.build()
    device = torch.device("cpu")
    stock.transformer.enable_group_offload(
        onload_device=device, offload_device=device, offload_type="leaf_level"
    )
    pipe = FewStepPipeline.wrap(stock, adapter=folder)
    torch.testing.assert_close(draw(pipe, SD3), expected)


@pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
def test_a_pipeline_moved_to_another_dtype_switches_there(policy: str, tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    expected = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder), SD3)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    draw(pipe, SD3)
    pipe.to(torch.float64)
    arguments = {
        name: value.double() if isinstance(value, torch.Tensor) else value
        for name, value in SD3.arguments(1).items()
    }
    picture = pipe(**arguments, seed=0)[0]
    assert picture.dtype == torch.float64
    assert_same_picture(picture.float(), expected)
    dtypes = {parameter.dtype for parameter in pipe.unwrap().transformer.parameters()}
    assert dtypes == {torch.float64}


def test_a_dora_cannot_share_a_slot(tmp_path: Path) -> None:
    import safetensors.torch

    recipe = expert_recipe(SD3)
    expert_file(SD3, tmp_path / "low_noise.safetensors", seed=2, recipe=recipe)
    high = expert_file(SD3, tmp_path / "high_noise.safetensors", seed=1, recipe=recipe)
    tensors = safetensors.torch.load_file(high)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[magnitude] = torch.ones(len(tensors[name]))
    safetensors.torch.save_file(tensors, high)
    with pytest.raises(AdapterError, match="is a DoRA, whose magnitudes cannot share a slot"):
        FewStepPipeline.wrap(SD3.build(), adapter=tmp_path, recipe=recipe, experts="hotswap")
    pictures = [
        draw(FewStepPipeline.wrap(SD3.build(), adapter=tmp_path, recipe=recipe, experts=p), SD3)
        for p in ("adapters", "fused")
    ]
    assert_same_picture(*pictures)
