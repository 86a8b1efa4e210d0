"""Offloading: hooks from before and after wrapping stay, adapters load under them.

Without an accelerator the "onload" device is the CPU: the hooks are the real ones and run, only
nothing is moved. Sequential offload keeps weights on the meta device until used, which accelerate
does not do towards a CPU, so it is checked on a GPU alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry

from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Sampler
from tests.tiny.adapters import lora_file
from tests.tiny.families import FLUX, SD3, SD15
from tests.tiny.family import TinyFamily

CPU = torch.device("cpu")


def offload_models(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_leaves(pipe: Any) -> None:
    pipe.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level", use_stream=False
    )


def offload_blocks(pipe: Any) -> None:
    pipe.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


KINDS = pytest.mark.parametrize(
    "offload", [offload_models, offload_leaves, offload_blocks], ids=lambda f: f.__name__
)
FAMILIES = pytest.mark.parametrize("family", [SD15, SD3, FLUX], ids=lambda f: f.name)


def hooks_on(pipe: Any, family: TinyFamily) -> int:
    """Modules of the denoiser that carry an offloading hook."""
    count = 0
    for module in pipe.components[family.denoisers[0]].modules():
        registry = getattr(module, "_diffusers_hook", None)
        is_group = isinstance(registry, HookRegistry) and bool(registry.hooks)
        count += is_group or hasattr(module, "_hf_hook")
    return count


def draw(pipe: Any, family: TinyFamily) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**family.arguments(1), seed=0)[0]


@KINDS
@FAMILIES
@pytest.mark.parametrize("is_first", [True, False], ids=["offload then wrap", "wrap then offload"])
def test_offloading_changes_neither_hooks_nor_picture(
    family: TinyFamily, offload: Callable[[Any], None], is_first: bool
) -> None:
    recipe = family.recipe(sampler=Sampler(stochasticity=1.0))
    expected = draw(FewStepPipeline.wrap(family.build(), recipe=recipe), family)
    stock = family.build()
    if is_first:
        offload(stock)
    before = hooks_on(stock, family)
    pipe = FewStepPipeline.wrap(stock, recipe=recipe)
    assert hooks_on(pipe, family) == before
    if not is_first:
        offload(pipe)
    assert hooks_on(pipe, family) > 0
    assert torch.equal(draw(pipe, family), expected)
    assert torch.equal(draw(pipe, family), expected)
    assert hooks_on(pipe.unwrap(), family) > 0


@KINDS
@pytest.mark.parametrize("family", [SD15, SD3], ids=lambda f: f.name)
@pytest.mark.parametrize("is_first", [True, False], ids=["offload then wrap", "wrap then offload"])
def test_an_adapter_loads_under_offloading(
    family: TinyFamily, offload: Callable[[Any], None], is_first: bool, tmp_path: Path
) -> None:
    file = lora_file(family, tmp_path / "a.safetensors")
    expected = draw(FewStepPipeline.wrap(family.build(), adapter=file), family)
    stock = family.build()
    if is_first:
        offload(stock)
    pipe = FewStepPipeline.wrap(stock, adapter=file)
    if not is_first:
        offload(pipe)
    assert hooks_on(pipe, family) > 0
    torch.testing.assert_close(draw(pipe, family), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="sequential offload needs an accelerator")
@pytest.mark.parametrize("kind", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_to_a_gpu(kind: str) -> None:
    recipe = SD15.recipe(stochasticity=1.0)
    expected = draw(FewStepPipeline.wrap(SD15.build().to("cuda"), recipe=recipe), SD15)
    pipe: Any = FewStepPipeline.wrap(SD15.build(), recipe=recipe)
    getattr(pipe, kind)()
    torch.testing.assert_close(draw(pipe, SD15), expected, rtol=1e-3, atol=1e-3)
