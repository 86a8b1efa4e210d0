"""`fewstep convert` with less than it would like: part of a file, damaged layers, wrong targets."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.adapters.conversion.convert import convert_file
from fewstep.adapters.conversion.text_names import kohya_text_name, text_target
from fewstep.errors import AdapterError
from tests.conversion_checks import read, write_diffusers
from tests.conversion_families import ALL, FLUX, WAN, ConversionFamily

LAYER = "diffusion_model.blocks.0.self_attn.q"
DAMAGED = {
    "a bias of another length": {"diff_b": (3,)},
    "a bias of the up matrix of another length": {"lora_up.bias": (3,)},
    "half of a LoKr": {"lokr_w1": (2, 2)},
    "LoKr factors that do not multiply": {
        "lokr_w1": (2, 2),
        "lokr_w2_a": (2, 3),
        "lokr_w2_b": (4, 2),
    },
    "half of a LoHa": {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)},
    "a middle matrix of another rank": {"lora_mid.weight": (3, 3, 1, 1)},
}


def lora_layer(family: ConversionFamily, module: str) -> dict[str, torch.Tensor]:
    out, into = family.modules()[module]
    generator = torch.Generator().manual_seed(0)
    return {
        f"{LAYER}.lora_down.weight": torch.randn(2, into, generator=generator),
        f"{LAYER}.lora_up.weight": torch.randn(out, 2, generator=generator),
    }


def shapes_on_disk(folder: Path, family: ConversionFamily) -> Path:
    path = folder / "base.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in family.shapes().items()}, path)
    return path


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_a_file_of_a_few_layers_needs_a_base_only_to_fuse_them(
    family: ConversionFamily, tmp_path: Path
) -> None:
    """Those few layers look like no whole base; the family that was given or seen counts."""
    tensors, alphas = family.lora()
    kept = [module for module in alphas if module.endswith(("to_q", "to_k", "to_v"))]
    some = {n: v for n, v in tensors.items() if n.rpartition(".lora_")[0] in kept}
    source = write_diffusers(
        tmp_path / "a.safetensors", family, some, {module: alphas[module] for module in kept}
    )
    if family.name in ("flux", "hunyuan-video"):  # linear1 is to_q, to_k, to_v and proj_mlp
        with pytest.raises(AdapterError, match="is one part of a fused layer .* give --base"):
            convert_file(source, tmp_path / "b.safetensors", "kohya", family=family.name)
        base = shapes_on_disk(tmp_path, family)
        there = convert_file(source, tmp_path / "b.safetensors", "kohya", base=base)
    else:
        there = convert_file(source, tmp_path / "b.safetensors", "kohya", family=family.name)
    back = convert_file(there.path, tmp_path / "c.safetensors", "diffusers", family=family.name)
    adapter = read(back.path, family)
    assert sorted(adapter.ranks) == sorted(kept)
    assert all(torch.equal(adapter.tensors[name], values) for name, values in some.items())


def test_the_family_is_seen_in_a_few_layers(tmp_path: Path) -> None:
    save_file(lora_layer(WAN, "blocks.0.attn1.to_q"), tmp_path / "a.safetensors")
    done = convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert (done.family, done.modules) == ("wan", 1)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_layers_are_one_sentence(damage: str, tmp_path: Path) -> None:
    tensors = {f"{LAYER}.{part}": torch.ones(shape) for part, shape in DAMAGED[damage].items()}
    if "lokr" not in str(tensors) and "hada" not in str(tensors):
        tensors |= lora_layer(WAN, "blocks.0.attn1.to_q")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=f"layer '{LAYER}' has .*; (the file is|use an)"):
        convert_file(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            "comfyui",
            base=shapes_on_disk(tmp_path, WAN),
        )
    assert not (tmp_path / "b.safetensors").exists()


def test_whole_deltas_of_8_bit_factors_are_multiplied_in_float32(tmp_path: Path) -> None:
    out, into = WAN.modules()["blocks.0.attn1.to_q"]
    first, second = torch.tensor([[1.0, -2.0], [0.5, 4.0]]), torch.ones(out // 2, into // 2)
    small = {"lokr_w1": first, "lokr_w2": second}
    save_file(
        {f"{LAYER}.{part}": values.to(torch.float8_e4m3fn) for part, values in small.items()},
        tmp_path / "a.safetensors",
    )
    base = shapes_on_disk(tmp_path, WAN)
    done = convert_file(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui", base=base
    )
    assert torch.equal(load_file(done.path)[f"{LAYER}.diff"], torch.kron(first, second))


def test_an_adapter_is_not_written_over_itself(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(lora_layer(WAN, "blocks.0.attn1.to_q"), source)
    before = source.read_bytes()
    with pytest.raises(AdapterError, match="would overwrite the adapter it is made from"):
        convert_file(source, tmp_path / "." / "a.safetensors", "diffusers")
    with pytest.raises(AdapterError, match=r"b\.pt: .* end the name in \.safetensors"):
        convert_file(source, tmp_path / "b.pt", "diffusers")
    assert source.read_bytes() == before


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    save_file(lora_layer(WAN, "blocks.0.attn1.to_q"), source)
    with pytest.raises(AdapterError, match=r"cannot be written \("):
        convert_file(source, source / "b.safetensors", "diffusers")


def test_a_file_of_two_networks_is_refused_not_halved(tmp_path: Path) -> None:
    tensors, alphas = WAN.lora()
    source = write_diffusers(tmp_path / "a.safetensors", WAN, tensors, alphas)
    both = load_file(source)
    both |= {n.replace("transformer.", "transformer_2.", 1): both[n].clone() for n in list(both)}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(AdapterError, match="layers of transformer and transformer_2"):
        convert_file(tmp_path / "both.safetensors", tmp_path / "b.safetensors", "comfyui")


def test_the_third_encoder_of_kohyas_flux_files_is_t5_the_second_of_diffusers() -> None:
    flat = "encoder_block_0_layer_0_SelfAttention_q"
    module = "encoder.block.0.layer.0.SelfAttention.q"
    assert text_target(f"lora_te3_{flat}", FLUX.name) == ("text_encoder_2", module)
    assert kohya_text_name("text_encoder_2", module, FLUX.name) == f"lora_te3_{flat}"
    assert text_target(f"lora_te3_{flat}", "sd3") == ("text_encoder_3", module)
    assert kohya_text_name("text_encoder_2", "x", "sdxl") == "lora_te2_x"


def test_a_folder_with_one_adapter_is_that_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    save_file(lora_layer(WAN, "blocks.0.attn1.to_q"), folder / "a.safetensors")
    assert convert_file(folder, tmp_path / "b.safetensors", "diffusers").modules == 1
    save_file(lora_layer(WAN, "blocks.0.attn1.to_q"), folder / "b.safetensors")
    with pytest.raises(AdapterError, match=r"2 .safetensors files here .* name the one you mean"):
        convert_file(folder, tmp_path / "c.safetensors", "diffusers")
