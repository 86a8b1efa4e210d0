"""Phase experts: every policy draws what the weights set by hand draw, and gives all of it back."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import PipelineError
from fewstep.pipeline import FewStepPipeline
from tests.expert_files import (
    HIGH,
    LOW,
    TOLERANCE,
    assert_same_picture,
    deltas_of,
    draw,
    draw_by_hand,
    expert_file,
    expert_folder,
)
from tests.tiny_pipelines import FLUX, PIXART, SD3, SD15, WAN22, TinyFamily, record_denoiser

POLICIES = pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])
ONE_NETWORK = pytest.mark.parametrize("family", [SD15, SD3, FLUX, PIXART], ids=lambda f: f.name)


def high_and_low(folder: Path, component: str, scale: float = 1.0) -> list[list[Any]]:
    """Per step: two of the high expert's, two of the low one's."""
    high = deltas_of(folder / "high_noise_model.safetensors", component, scale)
    low = deltas_of(folder / "low_noise_model.safetensors", component, scale)
    return [[high], [high], [low], [low]]


def state_of(pipe: Any, family: TinyFamily) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name in family.denoisers
        for key, value in pipe.components[name].state_dict().items()
    }


def assert_same_state(pipe: Any, family: TinyFamily, before: dict[str, torch.Tensor]) -> None:
    after = state_of(pipe, family)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def load_style(pipe: Any, file: Path) -> None:
    """As users do; peft asks to take care with several adapters, which is what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pipe.load_lora_weights(str(file), adapter_name="style")


@POLICIES
@ONE_NETWORK
def test_experts_of_one_network_draw_what_weights_set_by_hand_draw(
    family: TinyFamily, policy: str, tmp_path: Path
) -> None:
    folder, recipe = expert_folder(family, tmp_path)
    expected = draw_by_hand(family, recipe, high_and_low(folder, family.denoisers[0]))
    stock = family.build()
    before = state_of(stock, family)
    pipe = FewStepPipeline.wrap(stock, adapter=folder, experts=policy)
    assert_same_picture(draw(pipe, family), expected)
    assert_same_picture(draw(pipe, family), expected)  # from the last phase again
    assert_same_state(pipe.unwrap(), family, before)


@POLICIES
def test_experts_of_two_networks_draw_what_weights_set_by_hand_draw(
    policy: str, tmp_path: Path
) -> None:
    folder, recipe = expert_folder(WAN22, tmp_path, own_networks=True)
    high = deltas_of(folder / "high_noise_model.safetensors", "transformer")
    low = deltas_of(folder / "low_noise_model.safetensors", "transformer_2")
    expected = draw_by_hand(WAN22, recipe, [[high], [high], [low], [low]])
    stock = WAN22.build()
    before = state_of(stock, WAN22)
    pipe = FewStepPipeline.wrap(stock, adapter=folder, experts=policy)
    assert_same_picture(draw(pipe, WAN22), expected)
    assert_same_state(pipe.unwrap(), WAN22, before)


@POLICIES
def test_both_experts_matter(policy: str, tmp_path: Path) -> None:
    """The tolerance of the tests above is far below what a wrong switch changes."""
    folder, recipe = expert_folder(SD3, tmp_path)
    steps = high_and_low(folder, "transformer")
    ours = draw(FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy), SD3)
    for wrong in ([steps[0]] * 4, [steps[3]] * 4, [[]] * 4, [steps[0], *steps[2:], steps[3]]):
        other = draw_by_hand(SD3, recipe, wrong)
        assert (ours - other).abs().max() > 100 * TOLERANCE


@POLICIES
@pytest.mark.parametrize("num_high", [1, 3])
def test_the_boundary_is_the_recipes_step(policy: str, num_high: int, tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path, num_high=num_high)
    high, *_, low = high_and_low(folder, "transformer")
    expected = draw_by_hand(SD3, recipe, [high] * num_high + [low] * (4 - num_high))
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    assert_same_picture(draw(pipe, SD3), expected)


@POLICIES
def test_the_scale_is_applied_to_every_expert(policy: str, tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    expected = draw_by_hand(SD3, recipe, high_and_low(folder, "transformer", 0.5))
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=folder, adapter_scale=0.5, experts=policy)
    assert_same_picture(draw(pipe, SD3), expected)


@POLICIES
def test_a_style_lora_put_on_before_or_after_reaches_every_phase(
    policy: str, tmp_path: Path
) -> None:
    folder, recipe = expert_folder(SD3, tmp_path / "experts")
    style = expert_file(
        SD3, tmp_path / "style.safetensors", seed=7, layers=("to_v", "to_out.0"), strength=0.3
    )
    extra = deltas_of(style, "transformer", 0.7)
    steps = [[*step, extra] for step in high_and_low(folder, "transformer")]
    expected = draw_by_hand(SD3, recipe, steps)

    before: Any = SD3.build()
    load_style(before, style)
    before.set_adapters(["style"], [0.7])
    pipe: Any = FewStepPipeline.wrap(before, adapter=folder, experts=policy)
    assert_same_picture(draw(pipe, SD3), expected)
    assert pipe.unwrap().get_active_adapters() == ["style"]

    after: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    load_style(after, style)
    names = [] if policy == "fused" else list(dict.fromkeys(a.name for a in after.adapters))
    after.set_adapters([*names, "style"], [*[1.0] * len(names), 0.7])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_picture(draw(after, SD3), expected)


@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_an_adapter_that_set_adapters_leaves_out_is_put_on_again_with_one_warning(
    policy: str, tmp_path: Path
) -> None:
    folder, recipe = expert_folder(SD3, tmp_path / "experts")
    style = expert_file(SD3, tmp_path / "style.safetensors", seed=7, strength=0.3)
    extra = deltas_of(style, "transformer")
    steps = [[*step, extra] for step in high_and_low(folder, "transformer")]
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    load_style(pipe, style)  # leaves only "style" on
    with pytest.warns(UserWarning, match="had been switched off: loading a LoRA, or set_adapters"):
        first = draw(pipe, SD3)
    assert_same_picture(first, draw_by_hand(SD3, recipe, steps))
    pipe.set_adapters(["style"])
    assert_same_picture(draw(pipe, SD3), first)  # told once


@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_disabled_lora_is_said_and_left_as_it_is(policy: str, tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    pipe.disable_lora()
    with pytest.warns(UserWarning, match="LoRA layers are disabled"):
        picture = draw(pipe, SD3)
    assert_same_picture(picture, draw_by_hand(SD3, recipe, [[]] * 4))
    pipe.enable_lora()
    expected = draw_by_hand(SD3, recipe, high_and_low(folder, "transformer"))
    assert_same_picture(draw(pipe, SD3), expected)


@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_an_adapter_that_was_unloaded_is_an_error_and_unwrap_still_works(
    policy: str, tmp_path: Path
) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    stock: Any = SD3.build()
    before = state_of(stock, SD3)
    pipe: Any = FewStepPipeline.wrap(stock, adapter=folder, experts=policy)
    pipe.unload_lora_weights()
    with pytest.raises(PipelineError, match="the few-step adapter was removed"):
        draw(pipe, SD3)
    assert_same_state(pipe.unwrap(), SD3, before)


@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_fuse_lora_of_diffusers_would_freeze_one_expert_and_is_refused(
    policy: str, tmp_path: Path
) -> None:
    folder, recipe = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    pipe.fuse_lora()
    with pytest.raises(PipelineError, match="its experts can no longer take turns; call unfuse"):
        draw(pipe, SD3)
    with warnings.catch_warnings():  # peft mentions the layers that nothing was merged into
        warnings.simplefilter("ignore", UserWarning)
        pipe.unfuse_lora()
    expected = draw_by_hand(SD3, recipe, high_and_low(folder, "transformer"))
    torch.testing.assert_close(draw(pipe, SD3), expected, rtol=1e-3, atol=1e-3)


@POLICIES
def test_a_replaced_network_is_noticed(policy: str, tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    pipe.transformer = SD3.build().components["transformer"]
    with pytest.raises(PipelineError, match="transformer was replaced after"):
        draw(pipe, SD3)


@POLICIES
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copies_switch_their_own_weights(clone: Any, policy: str, tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=folder, experts=policy)
    picture = draw(pipe, SD3)
    other = clone(pipe)
    pipe.unwrap()
    assert torch.equal(draw(other, SD3), picture)


def test_an_unknown_policy_is_one_sentence(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD3, tmp_path)
    with pytest.raises(PipelineError, match="experts is 'split'; use one of 'adapters', 'fused'"):
        FewStepPipeline.wrap(SD3.build(), adapter=folder, experts="split")


def test_describe_shows_who_serves_each_step(tmp_path: Path) -> None:
    folder, _ = expert_folder(WAN22, tmp_path, own_networks=True)
    lines = FewStepPipeline.wrap(WAN22.build(), adapter=folder).describe().splitlines()
    steps = lines[next(i for i, line in enumerate(lines) if line.startswith("step  ")) + 1 :]
    assert [line.split("  ")[-1] for line in steps[:4]] == [
        *[f"{HIGH} on transformer"] * 2,
        *[f"{LOW} on transformer_2"] * 2,
    ]
    assert (
        "adapter   low_noise_model.safetensors at scale 1 for low_noise on transformer_2" in lines
    )


def test_each_step_runs_with_its_expert_active(tmp_path: Path) -> None:
    folder, _ = expert_folder(SD15, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD15.build(), adapter=folder)
    seen: list[list[str]] = []
    pipe.unet.register_forward_pre_hook(lambda *_: seen.append(pipe.get_active_adapters()))
    calls = record_denoiser(pipe, SD15)
    draw(pipe, SD15)
    assert len(calls) == 4
    assert seen == [["fewstep_high_noise"]] * 2 + [["fewstep_low_noise"]] * 2
