"""Pain 5: two experts, one `fuse_lora()`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.doctor import examine
from fewstep.pipeline import FewStepPipeline
from tests.expert_files import HIGH, LOW, expert_folder
from tests.pains.common import built, drawn, finding
from tests.tiny_pipelines import WAN22

OFF = {"guidance_scale": 1.0}
CALL = WAN22.arguments(1) | OFF


def with_both(folder: Path) -> Any:
    """Wan 2.2 with a LoRA on each transformer, loaded as the model card says."""
    pipe = built(WAN22, "FlowMatchEulerDiscreteScheduler", shift=5.0)
    high, low = "high_noise_model.safetensors", "low_noise_model.safetensors"
    pipe.load_lora_weights(str(folder), weight_name=high, adapter_name="high")
    pipe.load_lora_weights(
        str(folder), weight_name=low, adapter_name="low", load_into_transformer_2=True
    )
    pipe.set_adapters(["high", "low"], [1.0, 1.0])
    return pipe


def weights(pipe: Any, component: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in pipe.components[component].state_dict().items()}


def test_5_fuse_lora_fuses_the_first_expert_and_unloading_drops_the_other(tmp_path: Path) -> None:
    _, recipe = expert_folder(WAN22, tmp_path, own_networks=True)
    plain = {name: weights(built(WAN22), name) for name in WAN22.denoisers}
    pipe = with_both(tmp_path)
    right = drawn(pipe, WAN22, num_inference_steps=4, **OFF)
    assert "adapter/one-of-two-experts" not in examine(pipe, recipe=recipe, arguments=CALL).codes

    pipe.fuse_lora()
    found = examine(pipe, recipe=recipe, arguments=CALL)
    assert finding(found, "adapter/one-of-two-experts").evidence["lacking"] == "transformer_2"
    pipe.unload_lora_weights()
    second = weights(pipe, "transformer_2")
    assert all(torch.equal(second[k], plain["transformer_2"][k]) for k in second)
    assert not torch.allclose(drawn(pipe, WAN22, num_inference_steps=4, **OFF), right, atol=1e-3)
    finding(examine(pipe, recipe=recipe, arguments=CALL), "adapter/fused-without-trace")


def test_5_one_call_loads_both_experts_and_fuse_fuses_both(tmp_path: Path) -> None:
    folder, _ = expert_folder(WAN22, tmp_path, own_networks=True)
    plain = {name: weights(built(WAN22), name) for name in WAN22.denoisers}
    pipe = FewStepPipeline.wrap(built(WAN22), adapter=folder)
    attached = drawn(pipe, WAN22)
    pipe.fuse()
    torch.testing.assert_close(drawn(pipe, WAN22), attached, rtol=1e-4, atol=1e-5)
    for name in WAN22.denoisers:
        now = weights(pipe, name)
        assert any(not torch.equal(now[k], plain[name][k]) for k in now)


def test_5_the_grid_decides_how_many_steps_each_expert_makes(tmp_path: Path) -> None:
    folder, recipe = expert_folder(WAN22, tmp_path, own_networks=True)
    pipe = built(WAN22, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    files = {HIGH: folder / "high_noise_model.safetensors"}
    files[LOW] = folder / "low_noise_model.safetensors"
    found = examine(pipe, adapter=files, arguments=CALL)
    split = finding(found, "experts/other-split").evidence
    assert split["trained"] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert split["seen"] == ["transformer"] + ["transformer_2"] * 3
    assert recipe.experts[0].component == "transformer"
