"""Any naming to diffusers and back: every family, exactly, and nothing half."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.adapters import read_header
from fewstep.adapters.conversion import convert_to_diffusers
from fewstep.adapters.conversion.name_index import weights_of
from fewstep.adapters.conversion.name_rules import native_modules
from fewstep.adapters.conversion.writing import Format
from fewstep.adapters.families import family_of_base, guess_family
from fewstep.adapters.modules import lora_modules
from fewstep.errors import AdapterError
from tests.conversion_checks import (
    adapted,
    deltas,
    in_diffusers,
    merged,
    read,
    round_trip_error,
    write,
    write_diffusers,
)
from tests.conversion_families import (
    ALL,
    FLUX,
    HUNYUAN_VIDEO,
    IN_COMFYUI,
    SD3,
    SD15,
    SDXL,
    WAN,
    Z_IMAGE,
    ConversionFamily,
)

every_family = pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
PROJECT = Path(__file__).resolve().parents[1]


def source(folder: Path, family: ConversionFamily, scale: float = 0.5) -> Path:
    tensors, alphas = family.lora(scale=scale)
    return write_diffusers(folder / "source.safetensors", family, tensors, alphas)


def file_of(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: values.contiguous() for name, values in tensors.items()}, path, metadata)
    return path


@every_family
@pytest.mark.parametrize("flavour", ["diffusers", "comfyui", "kohya"])
def test_there_and_back_is_exact(family: ConversionFamily, flavour: Format, tmp_path: Path) -> None:
    if flavour == "comfyui" and family not in IN_COMFYUI:
        with pytest.raises(AdapterError, match=r"ComfyUI 0\.8\.0 has no"):
            round_trip_error(family, tmp_path, flavour)
        return
    assert round_trip_error(family, tmp_path, flavour) == 0.0


@every_family
@pytest.mark.parametrize("flavour", ["diffusers", "kohya"])
def test_every_module_lands_in_diffusers_and_does_what_its_delta_does(
    family: ConversionFamily, flavour: Format, tmp_path: Path
) -> None:
    """Against the tiny model with alpha / rank * up @ down added to its weights."""
    tensors, alphas = family.lora()
    converted = write(
        tmp_path / "a.safetensors", family, read(source(tmp_path, family), family), flavour
    )
    back = write(tmp_path / "b.safetensors", family, read(converted, family), "diffusers")
    model = in_diffusers(back, family)
    assert adapted(model) == set(alphas)
    wanted = family.output(merged(family, tensors, alphas))
    untouched = family.output(family.build().eval())
    assert (untouched - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert (family.output(model) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@every_family
def test_the_family_is_seen_from_the_base_and_from_the_names(
    family: ConversionFamily, tmp_path: Path
) -> None:
    assert family_of_base(family.shapes()) == family.name
    path = source(tmp_path, family)
    assert guess_family(lora_modules(read_header(path))) == family.name
    kohya = write(tmp_path / "k.safetensors", family, read(path, family), "kohya")
    assert guess_family(lora_modules(read_header(kohya))) == family.name


@every_family
def test_native_modules_are_all_rows_of_the_base_once(family: ConversionFamily) -> None:
    weights = weights_of(family.shapes())
    found = [part for native in native_modules(family.name, weights) for part in native.parts]
    once = {part: found.count(part) for part in found}
    aliases = {part for part in once if "upsamplers" in part}
    assert {part for part, count in once.items() if count > 1} <= aliases
    assert set(family.modules()) <= set(found)


@every_family
def test_a_file_with_one_foreign_layer_is_refused_with_its_name(
    family: ConversionFamily, tmp_path: Path
) -> None:
    tensors = load_file(source(tmp_path, family))
    tensors["transformer.blocks.99.nowhere.lora_A.weight"] = torch.ones(2, 4)
    tensors["transformer.blocks.99.nowhere.lora_B.weight"] = torch.ones(4, 2)
    path = file_of(tmp_path / "foreign.safetensors", tensors)
    with pytest.raises(AdapterError, match=r"only \d+ of \d+ modules fit .*99\.nowhere"):
        read(path, family)


@pytest.mark.parametrize("component", ["transformer.", "base_model.model.", "", "diffusion_model."])
@pytest.mark.parametrize(
    "ends",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
def test_prefixes_and_endings_mean_the_same(
    component: str, ends: tuple[str, str], tmp_path: Path
) -> None:
    tensors, alphas = SD3.lora(scale=1.0)
    renamed = {}
    for name, values in tensors.items():
        end = ends[0] if name.endswith("lora_A.weight") else ends[1]
        renamed[f"{component}{name.rpartition('.lora_')[0]}.{end}"] = values
    result = read(file_of(tmp_path / "a.safetensors", renamed), SD3)
    assert result.alphas == alphas
    assert all(torch.equal(result.tensors[name], values) for name, values in tensors.items())


@pytest.mark.parametrize("family", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("style", ["flat", "dotted", "processor"])
def test_unet_blocks_by_their_original_numbers_and_old_processors(
    family: ConversionFamily, style: str, tmp_path: Path
) -> None:
    """`input_blocks.1.1` and `attn1.processor.to_q_lora` are the same layers as ever."""
    tensors, alphas = family.lora(scale=1.0)
    original = {
        native.parts[0]: native.name
        for native in native_modules(family.name, weights_of(family.shapes()))
    }
    renamed = {}
    for name, values in tensors.items():
        module, _, end = name.rpartition(".lora_")
        matrix = "down" if end == "A.weight" else "up"
        if style == "flat":
            body = f"lora_unet_{original[module].replace('.', '_')}.lora_{matrix}.weight"
        elif style == "dotted":
            body = f"diffusion_model.{original[module]}.lora_{matrix}.weight"
        elif ".attn" in module and ".to_" in module:
            block, _, linear = module.partition(".to_")
            body = f"unet.{block}.processor.to_{linear.removesuffix('.0')}_lora.{matrix}.weight"
        else:
            body = f"unet.{module}.lora.{matrix}.weight"
        renamed[body] = values
    result = read(file_of(tmp_path / "a.safetensors", renamed), family)
    assert result.alphas == alphas
    assert all(torch.equal(result.tensors[name], values) for name, values in tensors.items())


def fused_file(tmp_path: Path, up: Tensor, down: Tensor, alpha: float, **metadata: str) -> Path:
    return file_of(
        tmp_path / "fused.safetensors",
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down,
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up,
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(alpha),
        },
        metadata or None,
    )


def test_a_trained_fused_layer_is_split_by_rows_and_comes_back(tmp_path: Path) -> None:
    down, up = torch.randn(6, 32), torch.randn(96, 6)
    adapter = read(fused_file(tmp_path, up, down, 3.0), FLUX)
    names = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert adapter.alphas == dict.fromkeys(names, 3.0)
    assert adapter.ranks == dict.fromkeys(names, 6)
    for i, name in enumerate(names):
        assert torch.equal(adapter.tensors[f"{name}.lora_A.weight"], down)
        assert torch.equal(adapter.tensors[f"{name}.lora_B.weight"], up[32 * i : 32 * i + 32])
    back = load_file(write(tmp_path / "back.safetensors", FLUX, adapter, "kohya"))
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    assert torch.equal(back[f"{layer}.lora_down.weight"], down)
    assert torch.equal(back[f"{layer}.lora_up.weight"], up)
    assert back[f"{layer}.alpha"].item() == 3.0


def test_separate_factors_make_a_block_diagonal_whose_product_is_theirs(tmp_path: Path) -> None:
    tensors, alphas = FLUX.lora()
    file = load_file(
        write(tmp_path / "k.safetensors", FLUX, read(source(tmp_path, FLUX), FLUX), "kohya")
    )
    names = [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"]
    layer = "lora_unet_double_blocks_1_img_attn_qkv"
    up, down = file[f"{layer}.lora_up.weight"], file[f"{layer}.lora_down.weight"]
    ranks = [tensors[f"{name}.lora_A.weight"].shape[0] for name in names]
    assert down.shape[0] == sum(ranks)
    product = up @ down * (file[f"{layer}.alpha"].item() / sum(ranks))
    wanted = torch.cat([deltas(tensors, alphas)[name] for name in names])
    assert torch.equal(product, wanted)


def test_a_lora_on_queries_alone_survives_a_fused_name(tmp_path: Path) -> None:
    module = "transformer_blocks.0.attn.to_q"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(3, 32),
        f"{module}.lora_B.weight": torch.randn(32, 3),
    }
    path = write_diffusers(tmp_path / "q.safetensors", FLUX, tensors, {module: 3.0})
    for keeps_metadata in (True, False):
        there = write(tmp_path / "k.safetensors", FLUX, read(path, FLUX), "kohya")
        if not keeps_metadata:
            save_file(load_file(there), there)
        adapter = read(there, FLUX)
        assert set(adapter.alphas) == {module}
        assert all(torch.equal(adapter.tensors[name], v) for name, v in tensors.items())


@pytest.mark.parametrize("family", [FLUX, HUNYUAN_VIDEO, SD3, Z_IMAGE], ids=lambda f: f.name)
def test_untrained_ups_of_zero_come_back_with_their_ranks(
    family: ConversionFamily, tmp_path: Path
) -> None:
    """Zeros say nothing about blocks; the file's metadata does."""
    tensors, alphas = family.lora()
    tensors = {n: v * 0 if n.endswith("B.weight") else v for n, v in tensors.items()}
    path = write_diffusers(tmp_path / "zero.safetensors", family, tensors, alphas)
    there = write(tmp_path / "k.safetensors", family, read(path, family), "kohya")
    adapter = read(there, family)
    assert adapter.alphas == alphas
    assert all(torch.equal(adapter.tensors[name], v) for name, v in tensors.items())


def test_another_alpha_inside_a_fused_layer_keeps_the_product(tmp_path: Path) -> None:
    tensors, alphas = FLUX.lora()
    alphas["transformer_blocks.0.attn.to_k"] *= 4  # a power of two: nothing is rounded
    path = write_diffusers(tmp_path / "s.safetensors", FLUX, tensors, alphas)
    adapter = read(write(tmp_path / "k.safetensors", FLUX, read(path, FLUX), "kohya"), FLUX)
    before, after = deltas(tensors, alphas), deltas(adapter.tensors, adapter.alphas)
    assert all(torch.equal(after[module], delta) for module, delta in before.items())


def test_shift_and_scale_change_places_between_the_two_codes(tmp_path: Path) -> None:
    """FLUX's own last modulation gives (shift, scale), diffusers' (scale, shift)."""
    down, up = torch.randn(2, 32), torch.randn(64, 2)
    layer = "diffusion_model.final_layer.adaLN_modulation.1"
    path = file_of(
        tmp_path / "a.safetensors",
        {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up},
    )
    adapter = read(path, FLUX)
    assert torch.equal(
        adapter.tensors["norm_out.linear.lora_B.weight"], torch.cat([up[32:], up[:32]])
    )
    assert torch.equal(adapter.tensors["norm_out.linear.lora_A.weight"], down)


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({}, 4.0),
        ({"alpha": "2"}, 2.0),
        ({"lora_alpha": "8.0"}, 8.0),
        ({"alpha": "much"}, 4.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16})}, 16.0),
        (
            {
                "lora_adapter_metadata": json.dumps(
                    {"transformer.lora_alpha": 16, "transformer.use_rslora": True}
                )
            },
            32.0,  # 16 / sqrt(4) = 32 / 4
        ),
    ],
)
def test_alpha_from_metadata(metadata: dict[str, str], alpha: float, tmp_path: Path) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    path = file_of(
        tmp_path / "a.safetensors",
        {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)},
        metadata,
    )
    assert list(read(path, FLUX).alphas.values()) == [alpha]
    assert [module.alpha or 4.0 for module in lora_modules(read_header(path))] == [alpha]


def test_alpha_tensors_win_over_a_number_in_the_metadata(tmp_path: Path) -> None:
    down, up = torch.randn(6, 32), torch.randn(96, 6)
    path = fused_file(tmp_path, up, down, 3.0, network_alpha="9")
    assert set(read(path, FLUX).alphas.values()) == {3.0}


def test_layers_of_nothing_but_zeros_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    tensors = load_file(source(tmp_path, FLUX, scale=1.0))
    tensors["lora_unet_position_embedding.lora_down.weight"] = torch.randn(2, 8)
    tensors["lora_unet_position_embedding.lora_up.weight"] = torch.zeros(8, 2)
    path = file_of(tmp_path / "a.safetensors", tensors)
    assert read(path, FLUX).coverage.matched == len(FLUX.modules())


def test_of_two_denoisers_in_one_file_the_wanted_one_is_read(tmp_path: Path) -> None:
    (high, alphas), (low, _) = WAN.lora(scale=1.0), WAN.lora(scale=1.0, seed=5)
    both = {f"transformer.{n}": v for n, v in high.items()}
    both |= {f"transformer_2.{n}": v for n, v in low.items()}
    header = read_header(file_of(tmp_path / "both.safetensors", both))
    for component, wanted in (("transformer", high), ("transformer_2", low)):
        adapter = convert_to_diffusers(header, WAN.shapes(), component=component)
        assert adapter.alphas == alphas
        assert all(torch.equal(adapter.tensors[name], v) for name, v in wanted.items())


def test_two_names_for_one_layer_must_say_the_same(tmp_path: Path) -> None:
    down, up = torch.randn(2, 24), torch.randn(24, 2)
    names = ("diffusion_model.blocks.0.self_attn.q", "transformer.blocks.0.attn1.to_q")
    tensors = {f"{name}.lora_A.weight": down.clone() for name in names}
    tensors |= {f"{name}.lora_B.weight": up.clone() for name in names}
    path = file_of(tmp_path / "a.safetensors", tensors)
    assert read(path, WAN).coverage.matched == 1
    tensors[f"{names[0]}.lora_B.weight"] += 1
    with pytest.raises(AdapterError, match="two different LoRAs for blocks.0.attn1.to_q"):
        read(file_of(path, tensors), WAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_up.weight": None}, "has no up matrix"),
        ({"lora_up.weight": (32, 2)}, "has down .* and up"),
        ({"oft_blocks": (2, 2)}, "neither LoRA"),
        ({"dora_scale": (1, 32)}, "normalises the inputs"),
    ],
)
def test_broken_layers_are_refused_in_one_sentence(
    change: dict[str, tuple[int, ...] | None], message: str, tmp_path: Path
) -> None:
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {
        f"{layer}.lora_down.weight": torch.ones(3, 32),
        f"{layer}.lora_up.weight": torch.ones(32, 3),
    }
    for end, shape in change.items():
        tensors.pop(f"{layer}.{end}", None)
        if shape:
            tensors[f"{layer}.{end}"] = torch.ones(shape)
    with pytest.raises(AdapterError, match=message) as caught:
        read(file_of(tmp_path / "a.safetensors", tensors), FLUX)
    assert "\n" not in str(caught.value)


def test_metadata_and_recipe_go_along(tmp_path: Path) -> None:
    tensors, alphas = FLUX.lora()
    kept = {"fewstep.recipe": "{}", "modelspec.title": "x", "modelspec.hash_sha256": "0xold"}
    path = write_diffusers(
        tmp_path / "s.safetensors", FLUX, tensors, alphas, {**kept, "sshs_model_hash": "old"}
    )
    written = read_header(write(tmp_path / "k.safetensors", FLUX, read(path, FLUX), "comfyui"))
    assert written.metadata["fewstep.recipe"] == "{}"
    assert written.metadata["modelspec.title"] == "x"
    assert written.metadata["modelspec.hash_sha256"] not in ("0xold", "")
    assert not {"sshs_model_hash", "lora_adapter_metadata"} & set(written.metadata)


def test_half_precision_files_stay_half(tmp_path: Path) -> None:
    tensors, alphas = FLUX.lora(dtype=torch.bfloat16)
    path = write_diffusers(tmp_path / "s.safetensors", FLUX, tensors, alphas)
    there = write(tmp_path / "k.safetensors", FLUX, read(path, FLUX), "kohya")
    adapter = read(there, FLUX)
    assert all(torch.equal(adapter.tensors[name], v) for name, v in tensors.items())
    assert {v.dtype for v in adapter.tensors.values()} == {torch.bfloat16}


def test_the_page_has_a_row_for_every_family_and_format() -> None:
    text = (PROJECT / "docs" / "adapters.md").read_text(encoding="utf-8")
    for family in ALL:
        for flavour in ("diffusers", "comfyui", "kohya"):
            rows = [
                line
                for line in text.splitlines()
                if line.startswith(f"| {family.name} | {flavour} |")
            ]
            assert len(rows) == 1
            cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
            if flavour == "comfyui" and family not in IN_COMFYUI:
                assert cells[2].startswith("no such model")
                continue
            assert cells[2] == f"{len(family.modules())} of {len(family.modules())}"
            assert float(cells[3]) < 1e-5
            assert float(cells[-1]) == 0.0
            if family in IN_COMFYUI and flavour != "diffusers":
                taken, _, tensors = cells[5].partition(" of ")
                assert taken == tensors
                assert float(cells[6]) < 1e-6
