"""The same file read by fewstep and by diffusers' own converters, by peft and by ComfyUI."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.adapters import read_header
from fewstep.adapters.conversion import convert_to_diffusers
from fewstep.adapters.conversion.name_index import weights_of
from fewstep.adapters.conversion.name_rules import native_modules
from fewstep.adapters.conversion.through_diffusers import LOADERS
from fewstep.errors import AdapterError
from tests.conversion_checks import (
    comfyui_job,
    deltas,
    in_diffusers,
    merged,
    quiet_diffusers,
    read,
    run_comfyui,
    write,
    write_diffusers,
)
from tests.conversion_families import (
    FLUX,
    HUNYUAN_VIDEO,
    IN_COMFYUI,
    LTX,
    QWEN_IMAGE,
    SD3,
    SD15,
    SDXL,
    WAN,
    Z_IMAGE,
    ConversionFamily,
    stock,
)

needs_comfyui = pytest.mark.skipif(
    "COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a ComfyUI folder"
)


def native_lora(
    family: ConversionFamily,
    wanted: Callable[[str], bool],
    *,
    is_flat: bool,
    alpha: float | None = None,
    ends: tuple[str, str] = ("lora_down", "lora_up"),
) -> dict[str, Tensor]:
    """A trained LoRA in a family's native names: dense, fused layers as one."""
    generator = torch.Generator().manual_seed(3)
    weights = weights_of(family.shapes())
    tensors = {}
    for native in native_modules(family.name, weights):
        weight = (sum(native.rows), *weights[native.parts[0]][1:])
        if not wanted(native.name) or len(weight) < 2:
            continue
        name = f"diffusion_model.{native.name}"
        if is_flat:
            name = f"lora_unet_{native.name.replace('.', '_')}"
        ones = (1,) * (len(weight) - 2)
        tensors[f"{name}.{ends[0]}.weight"] = torch.randn(4, *weight[1:], generator=generator)
        tensors[f"{name}.{ends[1]}.weight"] = torch.randn(weight[0], 4, *ones, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def converted_deltas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a converter of diffusers makes of it: module -> up @ down, alpha inside already."""
    modules = {n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")}
    plain = {n.removeprefix("transformer."): v for n, v in tensors.items()}
    alphas = {
        m.removeprefix("transformer."): float(tensors[f"{m}.lora_A.weight"].shape[0])
        for m in modules
    }
    return deltas(plain, alphas)


def ours(folder: Path, family: ConversionFamily, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    save_file(tensors, folder / "peer.safetensors")
    adapter = read(folder / "peer.safetensors", family)
    return deltas(adapter.tensors, adapter.alphas)


PEERS: dict[str, tuple[Any, ...]] = {
    "flux kohya": (
        FLUX,
        theirs._convert_kohya_flux_lora_to_diffusers,
        # Its widths of linear1 are the real model's, and it drops final_layer's alpha.
        lambda name: "linear1" not in name and name.startswith(("double_blocks", "single_blocks")),
        {"is_flat": True, "alpha": 2.0},
    ),
    "wan native": (
        WAN,
        theirs._convert_non_diffusers_wan_lora_to_diffusers,
        lambda name: name.startswith("blocks."),
        {"is_flat": False, "alpha": 2.0},
    ),
    "wan musubi": (
        WAN,
        theirs._convert_musubi_wan_lora_to_diffusers,
        lambda name: name.startswith("blocks."),
        {"is_flat": True, "alpha": 1.0},
    ),
    "qwen kohya": (
        QWEN_IMAGE,
        theirs._convert_non_diffusers_qwen_lora_to_diffusers,
        lambda name: True,
        {"is_flat": True, "alpha": 8.0},
    ),
    "z-image kohya, fused": (
        Z_IMAGE,
        theirs._convert_non_diffusers_z_image_lora_to_diffusers,
        lambda name: name.startswith("layers.") and "attention.qkv" in name,
        {"is_flat": True, "alpha": None, "ends": ("lora.down", "lora.up")},
    ),
    "hunyuan-video native": (
        HUNYUAN_VIDEO,
        theirs._convert_hunyuan_video_lora_to_diffusers,
        # It splits linear1 at the real model's width and swaps final_layer's down matrix too.
        lambda name: name.startswith("double_blocks"),
        {"is_flat": False, "alpha": None, "ends": ("lora_A", "lora_B")},
    ),
    "ltx native": (
        LTX,
        theirs._convert_non_diffusers_ltxv_lora_to_diffusers,
        lambda name: name.startswith("transformer_blocks"),
        {"is_flat": False, "alpha": None, "ends": ("lora_A", "lora_B")},
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_diffusers_own_converter_gives_the_same_deltas(name: str, tmp_path: Path) -> None:
    family, convert, wanted, how = PEERS[name]
    tensors = native_lora(family, wanted, **how)
    assert len(tensors) > 2
    before = ours(tmp_path, family, tensors)
    if family is HUNYUAN_VIDEO:  # diffusers reads the first release's spelling
        tensors = {_first_spelling(n): v for n, v in tensors.items()}
        assert ours(tmp_path, family, tensors).keys() == before.keys()
    after = converted_deltas(convert(dict(tensors)))
    assert after.keys() == before.keys()
    for module, delta in before.items():
        assert torch.allclose(delta, after[module], rtol=1e-5, atol=1e-5), module


def _first_spelling(name: str) -> str:
    for new, old in (("_attn.", "_attn_"), ("_mod.lin.", "_mod.linear."), ("mlp.0", "mlp.fc1")):
        name = name.replace(new, old)
    return name.replace("mlp.2", "mlp.fc2")


@pytest.mark.parametrize("family", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_a_kohya_unet_file_of_one_rank_is_read_alike_by_diffusers(
    family: ConversionFamily, tmp_path: Path
) -> None:
    """With ranks that differ, diffusers 0.42.1 scales some layers wrongly: docs/adapters.md."""
    tensors, _ = family.lora()
    keeps = {"lora_A.weight": lambda v: v[:2], "lora_B.weight": lambda v: v[:, :2]}
    tensors = {
        name: keeps[name[-13:]](values).contiguous()
        for name, values in tensors.items()
        if "add_embedding" not in name  # which it knows by SDXL's original name only
    }
    alphas = {n.removesuffix(".lora_A.weight"): 1.0 for n in tensors if n.endswith("A.weight")}
    path = write_diffusers(tmp_path / "s.safetensors", family, tensors, alphas)
    kohya = write(tmp_path / "k.safetensors", family, read(path, family), "kohya")
    with quiet_diffusers():
        output = family.output(in_diffusers(kohya, family))
    wanted = family.output(merged(family, tensors, alphas))
    assert (output - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_xlabs_files_go_through_diffusers(tmp_path: Path) -> None:
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    tensors = {
        "double_blocks.0.processor.qkv_lora1.down.weight": down,
        "double_blocks.0.processor.qkv_lora1.up.weight": up,
        "double_blocks.0.processor.proj_lora2.down.weight": torch.randn(2, 32),
        "double_blocks.0.processor.proj_lora2.up.weight": torch.randn(32, 2),
    }
    found = ours(tmp_path, FLUX, tensors)
    block = "transformer_blocks.0.attn"
    assert set(found) == {*(f"{block}.to_{x}" for x in "qkv"), f"{block}.to_add_out"}
    stacked = torch.cat([found[f"{block}.to_{x}"] for x in "qkv"])
    assert torch.allclose(stacked, up @ down)


def test_what_a_converter_of_diffusers_trips_over_is_one_sentence(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.processor.qkv_lora1.down.weight": torch.randn(2, 32)}
    with pytest.raises(AdapterError, match="diffusers cannot convert this flux adapter") as caught:
        ours(tmp_path, FLUX, tensors)
    assert "\n" not in str(caught.value)


def test_flux2_goes_through_diffusers(tmp_path: Path) -> None:
    """A family without a table here; its fused layers come apart in diffusers' converter."""
    with torch.device("meta"):
        model = stock.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )
    shapes = {name: tuple(values.shape) for name, values in model.named_parameters()}
    down, up = torch.randn(2, 32), torch.randn(96, 2)
    layer = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file(
        {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up},
        tmp_path / "flux2.safetensors",
    )
    adapter = convert_to_diffusers(
        read_header(tmp_path / "flux2.safetensors"), shapes, component="transformer"
    )
    found = deltas(adapter.tensors, adapter.alphas)
    assert set(found) == {f"transformer_blocks.0.attn.to_{x}" for x in "qkv"}
    assert torch.allclose(torch.cat(list(found.values())), up @ down)


@pytest.mark.parametrize("family", LOADERS)
def test_every_named_loader_is_there(family: str) -> None:
    from diffusers.loaders import lora_pipeline

    assert LOADERS[family] in vars(lora_pipeline)


def delta_of(layer: Any) -> Tensor:
    return layer.get_delta_weight("default")


def small_peft(config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny FLUX with a peft adapter on one layer, its matrices random."""
    model = FLUX.build().eval()
    inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, values in model.named_parameters():
        if "lora_" in name or "lokr_" in name:
            if "magnitude" not in name:
                values.data = torch.randn(values.shape, generator=generator)
            found[name] = values.data
    return model, found


LAYER = "transformer_blocks.0.attn.to_q"


def test_lokr_expands_to_what_peft_adds(tmp_path: Path) -> None:
    config = LoKrConfig(r=2, alpha=6, target_modules=[LAYER], decompose_factor=4)
    model, tensors = small_peft(config)
    named = {
        n.replace(f"{LAYER}.", f"lycoris_{LAYER.replace('.', '_')}.").removesuffix(".default"): v
        for n, v in tensors.items()
    }
    named[f"lycoris_{LAYER.replace('.', '_')}.alpha"] = torch.tensor(6.0)
    save_file(named, tmp_path / "lokr.safetensors")
    adapter = read(tmp_path / "lokr.safetensors", FLUX)
    wanted = delta_of(model.get_submodule(LAYER))
    assert set(adapter.extras) == {f"{LAYER}.weight"}
    assert torch.allclose(adapter.extras[f"{LAYER}.weight"], wanted, rtol=1e-5, atol=1e-5)


def test_dora_does_in_diffusers_what_it_does_in_peft_after_any_format(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=[LAYER], use_dora=True)
    model, tensors = small_peft(config)
    magnitude = next(v for n, v in tensors.items() if "magnitude" in n)
    magnitude.mul_(1.25)
    named = {
        f"transformer.{LAYER}.lora_A.weight": tensors[f"{LAYER}.lora_A.default.weight"],
        f"transformer.{LAYER}.lora_B.weight": tensors[f"{LAYER}.lora_B.default.weight"],
        f"transformer.{LAYER}.lora_magnitude_vector": magnitude,
        f"transformer.{LAYER}.alpha": torch.tensor(3.0),
    }
    save_file({n: v.contiguous() for n, v in named.items()}, tmp_path / "dora.safetensors")
    adapter = read(tmp_path / "dora.safetensors", FLUX)
    assert torch.equal(adapter.tensors[f"{LAYER}.lora_magnitude_vector"], magnitude)
    there = write(tmp_path / "comfy.safetensors", FLUX, adapter, "comfyui")
    assert load_file(there)[f"transformer.{LAYER}.dora_scale"].shape == (32, 1)
    back = write(tmp_path / "back.safetensors", FLUX, read(there, FLUX), "diffusers")
    wanted = FLUX.output(model)
    assert (FLUX.output(in_diffusers(back, FLUX)) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_loha_and_middle_matrices_expand_by_their_formulas(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(shape) for shape in ((32, 2), (2, 32)) * 2)
    flat = "lora_unet_double_blocks_0_img_attn_proj"
    loha = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    tensors = {f"{flat}.{end}": values for end, values in loha.items()}
    save_file({**tensors, f"{flat}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    extras = read(tmp_path / "a.safetensors", FLUX).extras
    wanted = (a1 @ b1) * (a2 @ b2) / 2
    assert torch.allclose(extras["transformer_blocks.0.attn.to_out.0.weight"], wanted)
    up, mid, down = torch.randn(32, 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, 32, 1, 1)
    flat = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{flat}.lora_up.weight": up, f"{flat}.lora_mid.weight": mid}
    save_file({**tensors, f"{flat}.lora_down.weight": down}, tmp_path / "b.safetensors")
    (delta,) = read(tmp_path / "b.safetensors", SD15).extras.values()
    sample = torch.randn(1, 32, 5, 5)
    steps = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(sample, down), mid), up)
    assert torch.allclose(nn.functional.conv2d(sample, delta), steps, rtol=1e-4, atol=1e-4)


def test_bias_deltas_ride_on_the_lora_in_diffusers(tmp_path: Path) -> None:
    """`diff_b`, as CausVid's and lightx2v's Wan files have it, alpha not applied to it."""
    native = "diffusion_model.blocks.0.self_attn.q"
    down, up, bias = torch.randn(2, 24), torch.randn(24, 2), torch.randn(24)
    tensors = {f"{native}.lora_down.weight": down, f"{native}.lora_up.weight": up}
    tensors |= {f"{native}.diff_b": bias, f"{native}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read(tmp_path / "a.safetensors", WAN)
    assert torch.equal(adapter.extras["blocks.0.attn1.to_q.bias"], bias)
    loaded = in_diffusers(write(tmp_path / "d.safetensors", WAN, adapter, "diffusers"), WAN)
    model = WAN.build().eval()
    layer = cast(Any, model.get_submodule("blocks.0.attn1.to_q"))
    layer.weight.data += up @ down / 2
    layer.bias.data += bias
    wanted = WAN.output(model)
    assert (WAN.output(loaded) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    again = read(write(tmp_path / "k.safetensors", WAN, adapter, "comfyui"), WAN)
    assert torch.equal(again.extras["blocks.0.attn1.to_q.bias"], bias)


def test_whole_deltas_of_weights_are_refused_for_diffusers(tmp_path: Path) -> None:
    save_file(
        {"diffusion_model.blocks.0.ffn.0.diff": torch.randn(32, 24)}, tmp_path / "a.safetensors"
    )
    adapter = read(tmp_path / "a.safetensors", WAN)
    with pytest.raises(AdapterError, match="give a rank"):
        write(tmp_path / "b.safetensors", WAN, adapter, "diffusers")
    there = write(tmp_path / "c.safetensors", WAN, adapter, "comfyui")
    assert list(load_file(there)) == ["diffusion_model.blocks.0.ffn.0.diff"]


@pytest.mark.parametrize(
    ("family", "name", "component", "module"),
    [
        (
            "sd15",
            "lora_te_text_model_encoder_layers_3_mlp_fc1",
            "text_encoder",
            "text_model.encoder.layers.3.mlp.fc1",
        ),
        (
            "sdxl",
            "lora_te2_text_model_encoder_layers_0_self_attn_out_proj",
            "text_encoder_2",
            "text_model.encoder.layers.0.self_attn.out_proj",
        ),
        (
            "sd3",
            "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0",
            "text_encoder_3",
            "encoder.block.0.layer.1.DenseReluDense.wi_0",
        ),
    ],
)
def test_text_encoder_layers_come_along(
    family: str, name: str, component: str, module: str, tmp_path: Path
) -> None:
    which = {"sd15": SD15, "sdxl": SDXL, "sd3": SD3}[family]
    tensors, alphas = which.lora()
    path = write_diffusers(tmp_path / "s.safetensors", which, tensors, alphas)
    file = load_file(write(tmp_path / "k.safetensors", which, read(path, which), "kohya"))
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    text = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file({**file, **text, f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "t.safetensors")
    adapter = read(tmp_path / "t.safetensors", which)
    assert adapter.coverage.text_encoder_modules == 1
    assert adapter.text_alphas == {component: {module: 1.0}}
    assert torch.equal(adapter.text_tensors[component][f"{module}.lora_A.weight"], down)
    there = write(tmp_path / "d.safetensors", which, adapter, "diffusers")
    assert torch.equal(load_file(there)[f"{component}.{module}.lora_B.weight"], up)
    back = write(tmp_path / "b.safetensors", which, read(there, which), "kohya")
    assert torch.equal(load_file(back)[f"{name}.lora_up.weight"], up)
    assert load_file(back)[f"{name}.alpha"].item() == 1.0


@needs_comfyui
def test_comfyui_takes_every_tensor_and_makes_our_deltas_of_them(tmp_path: Path) -> None:
    jobs = [
        comfyui_job(f, tmp_path, flavour) for f in IN_COMFYUI for flavour in ("comfyui", "kohya")
    ]
    without = dict(comfyui_job(SD3, tmp_path, "comfyui", "no alpha"))
    tensors = load_file(without["file"])
    without["file"] = str(tmp_path / "no-alpha.safetensors")
    save_file({n: v for n, v in tensors.items() if not n.endswith(".alpha")}, without["file"])
    results = {result["name"]: result for result in run_comfyui([*jobs, without], tmp_path)}
    assert results.pop("no alpha")["error"] == pytest.approx(1.0)  # alpha / rank is a half there
    assert len(results) == len(jobs)
    for name, result in results.items():
        assert result["taken"] == result["tensors"], (name, result["not_taken"])
        assert result["not_patched"] == [], name
        # ComfyUI sizes Z-Image's clock by the width, diffusers by the real model's.
        assert all("t_embedder" in other for other in result["other_shapes"]), name
        assert result["error"] < 1e-6, name
