"""Attaching any adapter file: namings, DoRA, whole differences, text encoders, bad values."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from fewstep.errors import AdapterError, PipelineError
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Lora
from tests.expert_files import (
    assert_same_picture,
    deltas_of,
    draw,
    draw_by_hand,
    expert_file,
    expert_folder,
)
from tests.tiny_pipelines import PIXART, SD3, SD15

POLICIES = pytest.mark.parametrize("policy", ["adapters", "fused", "hotswap"])


def with_alpha(file: Path, alpha: float) -> Path:
    """The same factors under kohya's names, with an alpha that divides them."""
    found = {}
    for name, value in safetensors.torch.load_file(file).items():
        component, _, rest = name.partition(".")
        module, _, kind = rest.rpartition(".lora_")
        prefix = "lora_unet_" if component == "unet" else "lora_transformer_"
        flat = prefix + module.replace(".", "_")
        found[f"{flat}.{'lora_down' if kind.startswith('A') else 'lora_up'}.weight"] = value
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    target = file.with_name("kohya.safetensors")
    safetensors.torch.save_file(found, target)
    return target


@POLICIES
@pytest.mark.parametrize("family", [SD15, SD3, PIXART], ids=lambda family: family.name)
def test_kohya_files_with_alpha_load_in_any_pipeline(
    family: Any, policy: str, tmp_path: Path
) -> None:
    """diffusers loads these names for some families only, and has no loader at all for PixArt."""
    file = expert_file(family, tmp_path / "a.safetensors", seed=1, rank=4)
    kohya = with_alpha(file, 1.0)
    recipe = family.recipe()
    quarter = deltas_of(file, family.denoisers[0], scale=0.25)
    expected = draw_by_hand(family, recipe, [[quarter]] * 4)
    pipe = FewStepPipeline.wrap(family.build(), adapter=kohya, recipe=recipe, experts=policy)
    assert_same_picture(draw(pipe, family), expected)


@pytest.mark.parametrize("policy", ["adapters", "fused"])
def test_a_dora_draws_what_diffusers_draws_with_it(policy: str, tmp_path: Path) -> None:
    file = expert_file(SD3, tmp_path / "a.safetensors", seed=1)
    tensors = safetensors.torch.load_file(file)
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        magnitude = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[magnitude] = 0.5 + torch.rand(len(tensors[name]), generator=generator)
    dora = tmp_path / "dora.safetensors"
    safetensors.torch.save_file(tensors, dora)
    stock: Any = SD3.build()
    stock.load_lora_weights(str(dora))
    theirs = draw(FewStepPipeline.wrap(stock, recipe=SD3.recipe()), SD3)
    pipe = FewStepPipeline.wrap(SD3.build(), adapter=dora, recipe=SD3.recipe(), experts=policy)
    assert_same_picture(draw(pipe, SD3), theirs)
    plain = draw(FewStepPipeline.wrap(SD3.build(), adapter=file), SD3)
    assert not torch.allclose(theirs, plain, atol=1e-2)


@POLICIES
def test_whole_differences_are_added_exactly_and_taken_back_exactly(
    policy: str, tmp_path: Path
) -> None:
    """`diff_b` and `diff` beside LoRA, as in Wan's CausVid files, each expert with its own."""
    folder, recipe = expert_folder(SD3, tmp_path)
    model = SD3.build().components["transformer"]
    bias = "transformer_blocks.0.attn.to_q.bias"
    whole = "proj_out.weight"
    shapes = {name: dict(model.named_parameters())[name].shape for name in (bias, whole)}
    steps = []
    for number, name in enumerate(("high_noise_model", "low_noise_model")):
        file = folder / f"{name}.safetensors"
        deltas = dict(deltas_of(file, "transformer")["transformer"])
        generator = torch.Generator().manual_seed(40 + number)
        tensors = safetensors.torch.load_file(file)
        for parameter, suffix in ((bias, "diff_b"), (whole, "diff")):
            delta = 0.2 * torch.randn(shapes[parameter], generator=generator)
            tensors[f"diffusion_model.{parameter.rpartition('.')[0]}.{suffix}"] = delta
            deltas[parameter] = delta
        tensors = {
            key.replace("transformer.", "diffusion_model.", 1): value
            for key, value in tensors.items()
        }
        safetensors.torch.save_file(tensors, file)
        steps += [[{"transformer": deltas}]] * 2
    expected = draw_by_hand(SD3, recipe, steps)
    stock = SD3.build()
    before = {k: v.clone() for k, v in stock.components["transformer"].state_dict().items()}
    pipe = FewStepPipeline.wrap(stock, adapter=folder, recipe=recipe, experts=policy)
    assert_same_picture(draw(pipe, SD3), expected)
    after = pipe.unwrap().components["transformer"].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def clip(width: int = 8) -> CLIPTextModel:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=8,
    )
    return CLIPTextModel(config).eval()


def sd15_with_text() -> Any:
    stock: Any = SD15.build()
    parts = {**stock.components, "text_encoder": clip()}
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


def text_lora(tmp_path: Path, kind: str) -> tuple[Path, torch.Tensor]:
    """The UNet's LoRA with one layer of CLIP beside it, in two dialects; and that layer's delta."""
    file = expert_file(SD15, tmp_path / "a.safetensors", seed=1)
    generator = torch.Generator().manual_seed(8)
    down = torch.randn(2, 8, generator=generator)
    up = torch.randn(8, 2, generator=generator)
    tensors = safetensors.torch.load_file(file)
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    if kind == "kohya":
        tensors = safetensors.torch.load_file(with_alpha(file, 2.0))
        flat = f"lora_te_{layer.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors[f"{flat}.alpha"] = torch.tensor(2.0)
    else:
        tensors |= {f"text_encoder.{layer}.lora_A.weight": down}
        tensors |= {f"text_encoder.{layer}.lora_B.weight": up}
    safetensors.torch.save_file(tensors, file)
    return file, up @ down


@POLICIES
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_text_encoder_layers_are_adapted_too(kind: str, policy: str, tmp_path: Path) -> None:
    file, delta = text_lora(tmp_path, kind)
    tokens = torch.arange(6)[None]
    stock = sd15_with_text()
    plain = stock.text_encoder(tokens)[0].detach()
    state = {k: v.clone() for k, v in stock.text_encoder.state_dict().items()}
    key = next(key for key in state if key.endswith("layers.0.self_attn.q_proj.weight"))
    by_hand = clip()
    by_hand.load_state_dict({**state, key: state[key] + delta})
    expected = by_hand(tokens)[0].detach()
    pipe: Any = FewStepPipeline.wrap(stock, adapter=file, recipe=SD15.recipe(), experts=policy)
    assert_same_picture(pipe.text_encoder(tokens)[0].detach(), expected)
    assert not torch.allclose(expected, plain, atol=1e-2)
    stock = pipe.unwrap()
    assert torch.equal(stock.text_encoder(tokens)[0].detach(), plain)
    assert stock.text_encoder.state_dict().keys() == state.keys()


def test_a_text_layer_that_does_not_fit_is_named(tmp_path: Path) -> None:
    file, _ = text_lora(tmp_path, "diffusers")
    stock = sd15_with_text()
    stock.text_encoder = clip(width=4)
    with pytest.raises(
        AdapterError, match=r"does not fit text_encoder: .*q_proj has the shape \[4"
    ):
        FewStepPipeline.wrap(stock, adapter=file, recipe=SD15.recipe())


def test_user_adapters_and_ours_are_diffusers_adapters(tmp_path: Path) -> None:
    """set_adapters, get_list_adapters and delete_adapters know what we attached."""
    folder, _ = expert_folder(SD3, tmp_path)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=folder)
    assert pipe.get_list_adapters() == {"transformer": ["fewstep_high_noise", "fewstep_low_noise"]}
    pipe.set_adapters(["fewstep_high_noise", "fewstep_low_noise"], [0.0, 0.0])
    base = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    torch.testing.assert_close(draw(pipe, SD3), draw(base, SD3))


@POLICIES
def test_a_file_with_nan_is_refused_before_anything_is_loaded(policy: str, tmp_path: Path) -> None:
    file = expert_file(SD3, tmp_path / "a.safetensors", seed=1)
    tensors = safetensors.torch.load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    safetensors.torch.save_file(tensors, file)
    stock = SD3.build()
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        FewStepPipeline.wrap(stock, adapter=file, recipe=SD3.recipe(), experts=policy)
    assert not any("lora" in name for name in stock.components["transformer"].state_dict())


def test_attaching_draws_no_random_numbers(tmp_path: Path) -> None:
    """peft would initialise layers at random; a user's global seed must go on as it was."""
    folder, _ = expert_folder(SD3, tmp_path)
    stock = SD3.build()
    before = torch.get_rng_state()
    FewStepPipeline.wrap(stock, adapter=folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_of_our_name_that_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    file = expert_file(SD3, tmp_path / "a.safetensors", seed=1)
    stock: Any = SD3.build()
    stock.load_lora_weights(str(file), adapter_name="fewstep")
    with pytest.raises(PipelineError, match="an adapter 'fewstep' is already attached"):
        FewStepPipeline.wrap(stock, adapter=file)
    assert stock.get_active_adapters() == ["fewstep"]


def test_a_lora_of_the_users_is_left_as_it_was_when_ours_does_not_load(tmp_path: Path) -> None:
    folder, recipe = expert_folder(SD3, tmp_path / "experts")
    style = expert_file(SD3, tmp_path / "style.safetensors", seed=7)
    stock: Any = SD3.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        stock.load_lora_weights(str(style), adapter_name="fewstep_low_noise")
    with pytest.raises(PipelineError, match="'fewstep_low_noise' is already attached"):
        FewStepPipeline.wrap(stock, adapter=folder, recipe=recipe)
    assert stock.get_list_adapters() == {"transformer": ["fewstep_low_noise"]}
    assert stock.get_active_adapters() == ["fewstep_low_noise"]


def test_weight_one_in_set_adapters_is_the_recipes_scale(tmp_path: Path) -> None:
    """Hyper-SD's FLUX LoRA wants 0.125; a user who adds a style names it with weight 1."""
    file = expert_file(SD3, tmp_path / "a.safetensors", seed=1)
    recipe = replace(SD3.recipe(), lora=Lora(scale=0.125))
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=file, recipe=recipe)
    expected = draw_by_hand(SD3, recipe, [[deltas_of(file, "transformer", 0.125)]] * 4)
    assert_same_picture(draw(pipe, SD3), expected)
    pipe.set_adapters(["fewstep"])
    assert_same_picture(draw(pipe, SD3), expected)
    pipe.set_adapters(["fewstep"], [0.5])
    half = draw_by_hand(SD3, recipe, [[deltas_of(file, "transformer", 0.0625)]] * 4)
    assert_same_picture(draw(pipe, SD3), half)


@pytest.mark.parametrize("policy", ["adapters", "hotswap"])
def test_fuse_lora_and_unload_of_diffusers_keep_one_adapter_in_the_weights(
    policy: str, tmp_path: Path
) -> None:
    """Documented in diffusers; for one adapter on one network it is as good as our fuse()."""
    file = expert_file(SD3, tmp_path / "a.safetensors", seed=1)
    pipe: Any = FewStepPipeline.wrap(SD3.build(), adapter=file, experts=policy)
    picture = draw(pipe, SD3)
    pipe.fuse_lora()
    assert_same_picture(draw(pipe, SD3), picture)
    pipe.unload_lora_weights()
    assert_same_picture(draw(pipe, SD3), picture)
