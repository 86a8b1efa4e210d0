"""Adapter files without torch: headers, damage, coverage, families, inspection."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.adapters import (
    base_shapes_of_folder,
    check_coverage,
    denoiser_shapes,
    inspect_adapter,
    lora_modules,
    read_header,
)
from fewstep.adapters.modules import ConfigAlphas
from fewstep.adapters.names import parse_name
from fewstep.errors import AdapterError, FewstepError, RecipeError, RecipeVersionError
from fewstep.recipe import METADATA_KEY, Base, FewStepRecipe, Grid, Sampler, Schedule
from tests.line_budget import at_most_lines

BITS = {"F32": 32, "F16": 16, "BF16": 16, "I64": 64}
RECIPE = FewStepRecipe(
    base=Base(family="sd3", prediction="flow", schedule=Schedule(kind="flow", shift=1.0)),
    grids=(Grid(timesteps=(1000.0, 500.0), sigmas=(1.0, 0.5, 0.0)),),
    default_steps=2,
    sampler=Sampler(stochasticity=1.0),
)
Spec = tuple[str, tuple[int, ...]]


def packed(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors_bytes(
    tensors: dict[str, Spec], metadata: dict[str, str] | None = None, data: bytes | None = None
) -> bytes:
    """A valid file; the data is zeros unless given."""
    content: dict[str, object] = {"__metadata__": metadata} if metadata is not None else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + BITS[dtype] // 8
        for size in shape:
            end += (end - position) * (size - 1)
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return packed(content, bytes(position) if data is None else data)


def pair(module: str, rank: int, inner: int, outer: int, kind: str = "peft") -> dict[str, Spec]:
    """Down and up of a linear layer, in PEFT's or kohya's spelling."""
    down, up = ("lora_A", "lora_B") if kind == "peft" else ("lora_down", "lora_up")
    return {
        f"{module}.{down}.weight": ("F32", (rank, inner)),
        f"{module}.{up}.weight": ("F32", (outer, rank)),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def test_header_gives_dtype_shape_and_metadata(path: Path) -> None:
    path.write_bytes(safetensors_bytes({"a": ("F16", (2, 3)), "b": ("F32", ())}, {"title": "x"}))
    header = read_header(path)
    assert header.metadata == {"title": "x"}
    assert [(i.dtype, i.shape, i.num_bytes) for i in header.tensors.values()] == [
        ("F16", (2, 3), 12),
        ("F32", (), 4),
    ]
    assert header.recipe() is None


def test_header_agrees_with_the_safetensors_library(path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    import numpy as np

    numpy_io.save_file({"x": np.zeros((3, 2), np.float32), "y": np.ones(5, np.float16)}, str(path))
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    assert shapes == {"x": (3, 2), "y": (5,)}


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(packed(text.ljust(640), bytes(4)))
    assert path.read_bytes().startswith(b"\x80\x02")
    assert list(read_header(path).tensors) == ["a"]


def entry(
    shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": (b"", "is empty"),
    "five bytes": (b"abcde", "5 bytes, too few"),
    "header longer than the file": (struct.pack("<Q", 500) + b"{}", "cut short inside its header"),
    "absurd length": (struct.pack("<Q", 2**60) + b"{}", "claims a header of"),
    "web page": (b"<!DOCTYPE html><html>" + bytes(99), "claims a header of"),
    "zip pickle": (b"PK\x03\x04" + bytes(99), "is a pickle file"),
    "plain pickle": (b"\x80\x02}q\x00X\x01\x00" + bytes(99), "is a pickle file"),
    "not JSON": (packed(b"hello, this is no JSON"), "not valid JSON"),
    "not UTF-8": (packed(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "deep JSON": (packed(b"[" * 100_000), "nested too deeply"),
    "duplicate key": (packed(b'{"a": {}, "a": {}}'), "a key appears twice"),
    "JSON list": (packed([1, 2]), "not a JSON object"),
    "metadata list": (packed({"__metadata__": ["x"]}), "not text to text"),
    "metadata number": (packed({"__metadata__": {"x": 1}}), "not text to text"),
    "entry without dtype": (packed({"a": {"shape": [1]}}), "must have dtype, shape"),
    "entry text": (packed({"a": "b"}), "must have dtype, shape"),
    "unknown dtype": (packed({"a": entry(dtype="Q4_K")}, bytes(4)), "unknown dtype 'Q4_K'"),
    "negative shape": (packed({"a": entry(shape=[-1])}, bytes(4)), "impossible shape"),
    "boolean shape": (packed({"a": entry(shape=[True])}, bytes(4)), "impossible shape"),
    "seventeen sizes": (packed({"a": entry(shape=[1] * 17)}, bytes(4)), "impossible shape"),
    "one offset": (packed({"a": entry(offsets=[0])}, bytes(4)), "impossible data_offsets"),
    "backward offsets": (packed({"a": entry(offsets=[4, 0])}, bytes(4)), "has -4 bytes"),
    "wrong length": (packed({"a": entry(shape=[2])}, bytes(4)), "has 4 bytes of data, wanted 8"),
    "overlap": (packed({"a": entry(), "b": entry()}, bytes(8)), "'b' overlaps"),
    "gap": (packed({"a": entry(offsets=[4, 8])}, bytes(8)), "'a' leaves a gap"),
    "out of range": (packed({"a": entry()}, bytes(2)), "cut short"),
    "trailing bytes": (packed({"a": entry()}, bytes(9)), "5 bytes after its last tensor"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_named_in_one_sentence(path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    path.write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        read_header(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickle_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"adapter{suffix}"
    path.write_bytes(safetensors_bytes({}))
    with pytest.raises(AdapterError, match="pickle file, which can run code"):
        read_header(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(AdapterError, match="this is a folder"):
        read_header(tmp_path)


def test_recipe_survives_and_its_errors_name_the_file(path: Path) -> None:
    path.write_bytes(safetensors_bytes({}, {METADATA_KEY: RECIPE.to_json()}))
    assert read_header(path).recipe() == RECIPE
    newer = RECIPE.to_json().replace("fewstep.recipe/1", "fewstep.recipe/2")
    for text, kind in (("{", RecipeError), (newer, RecipeVersionError)):
        path.write_bytes(safetensors_bytes({}, {METADATA_KEY: text}))
        with pytest.raises(kind, match=r"adapter\.safetensors: "):
            read_header(path).recipe()


BASE = {
    "blocks.0.to_q.weight": (32, 16),
    "blocks.0.to_q.bias": (32,),
    "blocks.0.norm.weight": (16,),
    "conv.weight": (8, 4, 3, 3),
}
CONV: dict[str, Spec] = {
    "unet.conv.lora_A.weight": ("F32", (2, 4, 3, 3)),
    "unet.conv.lora_B.weight": ("F32", (8, 2, 1, 1)),
}


def test_full_coverage_reports_ranks_and_alphas(path: Path) -> None:
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"^conv": 1.0}, "unet.r": 4}
    path.write_bytes(
        safetensors_bytes(
            {**pair("unet.blocks.0.to_q", 4, 16, 32), **CONV},
            {"lora_adapter_metadata": json.dumps(config)},
        )
    )
    coverage = check_coverage(read_header(path), BASE)
    assert (coverage.matched, coverage.modules, coverage.text_encoder_modules) == (2, 2, 0)
    assert coverage.ranks == {"blocks.0.to_q": 4, "conv": 2}
    assert coverage.alphas == {"blocks.0.to_q": 8.0, "conv": 1.0}


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({}, 8.0),
        ({"^blocks.0.to_q": 1}, 1.0),
        ({"to_q": 1}, 1.0),
        ({"0.to_q": 1}, 1.0),
        ({"blocks.0.to_q": 1}, 1.0),
        ({"^to_q": 1}, 8.0),
        ({"o_q": 1, "blocks": 2, "blocks.*to_q": 3, "": 4}, 8.0),
        ({"to_q": 1, "0.to_q": 2, "^blocks.0.to_q": 3}, 1.0),
        ({"^blocks.0.to_q": 3, "0.to_q": 2, "to_q": 1}, 3.0),
        ({"0.to_q": 2, "to_q": 1, "^blocks.0.to_q": 3}, 2.0),
    ],
)
def test_patterns_are_names_or_their_last_parts_and_the_first_counts(
    patterns: dict[str, int], alpha: float
) -> None:
    config = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": patterns}
    name = parse_name("transformer.blocks.0.to_q.lora_A.weight")
    assert name.component == "transformer"
    assert ConfigAlphas(config).of(name) == alpha


def test_many_patterns_for_many_layers_take_no_longer(path: Path) -> None:
    """Twenty thousand of each; one by one that would be a comparison of 400 million."""
    modules = [f"blocks.{index}.to_q" for index in range(20_000)]
    patterns = {f"x.{module}": 1 for module in modules} | {"^" + "a." * 100_000: 2}
    names = [parse_name(f"diffusion_model.{module}.lora_A.weight") for module in modules]
    with at_most_lines(100 * len(modules)):
        alphas = ConfigAlphas({"lora_alpha": 3, "alpha_pattern": patterns})
        assert {alphas.of(name) for name in names} == {3.0}


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("F32", struct.pack("<f", 2.5)),
        ("F16", struct.pack("<e", 2.5)),
        ("BF16", struct.pack("<f", 2.5)[2:]),
    ],
)
def test_kohya_names_match_flattened_and_alpha_tensors_are_read(
    path: Path, dtype: str, data: bytes
) -> None:
    tensors = pair("lora_unet_blocks_0_to_q", 4, 16, 32, kind="kohya")
    tensors["lora_unet_blocks_0_to_q.alpha"] = (dtype, ())
    tensors |= pair("lora_te1_encoder_q", 4, 16, 32, kind="kohya")
    body = bytes(4 * (4 * 16 + 32 * 4))
    path.write_bytes(safetensors_bytes(tensors, data=body + data + body))
    coverage = check_coverage(read_header(path), BASE)
    assert coverage.alphas == {"blocks.0.to_q": 2.5}
    assert (coverage.modules, coverage.text_encoder_modules) == (1, 1)


MISFITS: dict[str, tuple[dict[str, Spec], str]] = {
    "none": (
        pair("transformer.other.to_q", 4, 16, 32),
        "none of 1 LoRA modules fit this base; the first that does not: 'other.to_q' is not in",
    ),
    "partial": (
        {**pair("unet.blocks.0.to_q", 4, 16, 32), **pair("unet.blocks.1.to_q", 4, 16, 32)},
        "only 1 of 2 LoRA modules fit this base; the first that does not: 'blocks.1.to_q'",
    ),
    "shape": (
        pair("unet.blocks.0.to_q", 4, 99, 32),
        "has down [4, 99] and up [32, 4], the base weight is [32, 16]",
    ),
    "transposed": (pair("unet.blocks.0.to_q", 4, 32, 16), "is transposed"),
    "linear on a convolution": (pair("unet.conv", 2, 4, 8), "the base weight is [8, 4, 3, 3]"),
    "norm": (pair("unet.blocks.0.norm", 4, 16, 16), "the base weight is [16]"),
    "text encoder only": (pair("text_encoder.layers.0.q", 4, 16, 32), "no LoRA modules for the"),
    "not a LoRA": ({"conv.weight": ("F32", (8, 4, 3, 3))}, "1 of 1 tensors are not plain LoRA"),
    "half a pair": (
        {"unet.blocks.0.to_q.lora_A.weight": ("F32", (4, 16))},
        "'blocks.0.to_q' has no up matrix",
    ),
    "two ranks": (
        {
            "unet.conv.lora_A.weight": ("F32", (4, 16)),
            "unet.conv.lora_B.weight": ("F32", (32, 8)),
        },
        "wanted (rank, in) and (out, rank) of one rank",
    ),
    "mixed names": (
        {**pair("unet.blocks.0.to_q", 4, 16, 32), **pair("blocks.0.to_k", 4, 16, 32)},
        "mixes bare and diffusers/PEFT names",
    ),
    "native names": (
        pair("diffusion_model.joint_blocks.0.qkv", 4, 16, 48),
        "or convert its ComfyUI native names to diffusers names",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_misfit_is_refused_with_its_first_offender(path: Path, kind: str) -> None:
    tensors, message = MISFITS[kind]
    path.write_bytes(safetensors_bytes(tensors))
    with pytest.raises(AdapterError) as caught:
        check_coverage(read_header(path), BASE)
    assert message in str(caught.value)


def test_an_infinite_alpha_is_refused(path: Path) -> None:
    tensors = {**pair("unet.conv", 1, 1, 1), "unet.conv.alpha": ("F32", ())}
    path.write_bytes(safetensors_bytes(tensors, data=bytes(8) + struct.pack("<f", float("inf"))))
    with pytest.raises(AdapterError, match="not one finite number"):
        lora_modules(read_header(path))


def test_base_shapes_come_from_single_variant_and_sharded_files(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    stem = "diffusion_pytorch_model"
    (folder / f"{stem}.fp16.safetensors").write_bytes(safetensors_bytes({"v": ("F16", (1,))}))
    assert base_shapes_of_folder(tmp_path, "unet") == {"v": (1,)}
    (folder / f"{stem}.safetensors").write_bytes(safetensors_bytes({"a": ("F32", (2, 3))}))
    assert base_shapes_of_folder(tmp_path, "unet") == {"a": (2, 3)}
    for number, name in enumerate("ab"):
        shard = folder / f"{stem}-{number}.safetensors"
        shard.write_bytes(safetensors_bytes({name: ("F32", (number + 1,))}))
    index = folder / f"{stem}.safetensors.index.json"
    weight_map = {"a": f"{stem}-0.safetensors", "b": f"{stem}-1.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert denoiser_shapes(tmp_path) == denoiser_shapes(folder) == {"a": (1,), "b": (2,)}
    for bad in ({"a": "../x.safetensors"}, {"c": f"{stem}-0.safetensors"}, "text"):
        index.write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(AdapterError, match="index"):
            denoiser_shapes(tmp_path)


def test_a_base_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        base_shapes_of_folder(tmp_path, "unet")
    with pytest.raises(AdapterError, match=r"no \.safetensors weights here"):
        denoiser_shapes(tmp_path)


UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FAMILIES = {
    "sd15": [(f"unet.{UNET}", 768)],
    "sd2": [(f"unet.{UNET}", 1024)],
    "sdxl": [(f"lora_unet_{UNET.replace('.', '_')}", 2048)],
    "sdxl ": [("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", 64)],
    "sd3": [("transformer.transformer_blocks.0.attn.add_q_proj", 1536)],
    "sd3 ": [("diffusion_model.joint_blocks.0.x_block.attn.qkv", 1536)],
    "sd3  ": [
        ("transformer.transformer_blocks.0.attn.add_q_proj", 128),
        ("transformer.transformer_blocks.0.ff.net.0.proj", 128),
    ],
    "flux": [
        ("transformer.transformer_blocks.0.attn.to_q", 3072),
        ("transformer.single_transformer_blocks.0.attn.to_q", 3072),
    ],
    "flux ": [("lora_unet_double_blocks_0_img_attn_qkv", 3072)],
    "qwen-image": [("transformer.transformer_blocks.0.attn.to_q", 3072)],
    "qwen-image ": [("transformer_blocks.0.img_mlp.net.0.proj", 64)],
    "pixart": [
        ("transformer.transformer_blocks.0.attn1.to_q", 1152),
        ("transformer.transformer_blocks.0.ff.net.0.proj", 1152),
    ],
    "sana": [("transformer.transformer_blocks.0.ff.conv_inverted", 2240)],
    "pixart or sana": [("transformer.transformer_blocks.0.attn2.to_q", 1152)],
    "z-image": [("transformer.layers.0.attention.to_q", 3840)],
    "wan": [("transformer.blocks.0.attn1.to_q", 1536)],
    "wan ": [("diffusion_model.blocks.0.self_attn.q", 5120)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_guessed_from_module_names(path: Path, family: str) -> None:
    tensors: dict[str, Spec] = {}
    for module, width in FAMILIES[family]:
        tensors |= pair(module, 1, width, 1)
    path.write_bytes(safetensors_bytes(tensors))
    report = inspect_adapter(path)
    assert (report.family, report.family_source) == (family.strip(), "guessed")


def test_kohya_file_is_described(path: Path) -> None:
    module = f"lora_unet_{UNET.replace('.', '_')}"
    tensors = {**pair(module, 4, 768, 320, kind="kohya"), f"{module}.alpha": ("F32", ())}
    size = 4 * 4 * (768 + 320)
    path.write_bytes(safetensors_bytes(tensors, data=bytes(size) + struct.pack("<f", 1.0)))
    report = inspect_adapter(path)
    assert report.naming == ("kohya",)
    assert [(r.rank, r.alpha, r.modules, r.scale) for r in report.ranks] == [(4, 1.0, 1, 0.25)]
    (warning,) = report.warnings
    assert warning.startswith("no recipe in the file")
    assert "4, alpha 1, scale 0.25: 1 modules" in report.to_text()


def test_comfyui_file_without_alpha_is_described(path: Path) -> None:
    tensors = pair("diffusion_model.joint_blocks.0.x_block.attn.qkv", 8, 64, 192)
    path.write_bytes(safetensors_bytes(tensors, {METADATA_KEY: RECIPE.to_json()}))
    report = inspect_adapter(path)
    assert report.naming == ("ComfyUI native",)
    assert (report.family, report.family_source) == ("sd3", "recipe")
    assert report.summary == "2 steps, guidance off, LCM (fresh noise each step)"
    assert "alpha not stored (read as the rank)" in report.to_text()
    assert '"family": "sd3"' in report.to_text()
    assert json.loads(json.dumps(report.to_dict()))["recipe"]["default_steps"] == 2


def test_old_diffusers_names_are_read(path: Path) -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    tensors: dict[str, Spec] = {
        f"{stem}.to_out_lora.down.weight": ("F32", (2, 8)),
        f"{stem}.to_out_lora.up.weight": ("F32", (8, 2)),
    }
    path.write_bytes(safetensors_bytes(tensors))
    (module,) = lora_modules(read_header(path))
    assert module.name.module.endswith("transformer_blocks.0.attn1.to_out.0")


def test_traps_of_other_readers_are_warned_of(path: Path) -> None:
    config = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})
    tensors = pair("transformer.blocks.0.attn1.to_q", 4, 16, 32)
    path.write_bytes(
        safetensors_bytes(
            tensors, {"lora_adapter_metadata": config, METADATA_KEY: RECIPE.to_json()}
        )
    )
    first, second = inspect_adapter(path).warnings
    assert first == "the recipe says sd3, the module names look like wan"
    assert "ComfyUI does not read it" in second
    tensors["transformer.blocks.0.attn1.to_q.alpha"] = ("F32", ())
    path.write_bytes(safetensors_bytes(tensors, {"lora_adapter_metadata": config}))
    assert any("diffusers refuses both" in text for text in inspect_adapter(path).warnings)
    lokr: dict[str, Spec] = {"lora_unet_x.lokr_w1": ("F32", (1,)), "lora_unet_x.alpha": ("F32", ())}
    path.write_bytes(safetensors_bytes(lokr))
    assert "no LoRA modules" in inspect_adapter(path).warnings[0]


def test_coverage_of_a_base_is_reported_not_raised(tmp_path: Path, path: Path) -> None:
    (tmp_path / "unet").mkdir()
    weights = {name: ("F32", shape) for name, shape in BASE.items()}
    (tmp_path / "unet" / "model.safetensors").write_bytes(safetensors_bytes(weights))
    path.write_bytes(safetensors_bytes(pair("unet.blocks.0.to_q", 4, 16, 32)))
    assert "coverage  1 of 1 modules" in inspect_adapter(path, tmp_path).to_text()
    path.write_bytes(safetensors_bytes(pair("unet.blocks.7.to_q", 4, 16, 32)))
    report = inspect_adapter(path, tmp_path)
    assert report.coverage is None
    assert "blocks.7.to_q' is not in the base" in (report.coverage_error or "")


def test_terminal_escapes_in_a_file_do_not_reach_the_terminal(path: Path) -> None:
    title = {"modelspec.title": "nice\x1b]0;owned\x07\n\x1b[2J"}
    path.write_bytes(safetensors_bytes(pair("\x1b[31mbad", 1, 1, 1), title))
    text = inspect_adapter(path).to_text()
    assert "\x1b" not in text
    assert "\x07" not in text
    with pytest.raises(AdapterError) as caught:
        check_coverage(read_header(path), BASE)
    assert "\x1b" not in str(caught.value)


def mutated(original: bytes, rng: random.Random) -> bytes:
    """The file with its header or data changed; the length stays true in most cases."""
    split = 8 + int.from_bytes(original[:8], "little")
    header, body = bytearray(original[8:split]), bytearray(original[split:])
    for _ in range(rng.randint(1, 3)):
        data = rng.choice([header, header, body])
        at = rng.randrange(len(data) or 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 40)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case 3:
                data[at : at + 1] = bytes([rng.randrange(97, 123)])
            case 4:
                digits = [i for i, b in enumerate(data) if chr(b).isdigit()] or [0]
                data[rng.choice(digits)] = ord(rng.choice("0123456789-e."))
            case _:
                old = rng.choice([b"F32", b"lora_A", b"weight", b"alpha", b"[", b"}", b"1000.0"])
                new = rng.choice([b"F16", b"lora_B", b"", b"null", b"[[[[", b"1e999", b"9" * 5000])
                data[:] = bytes(data).replace(old, new, 1)
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, 7, 640, length - 1, length + 1, 2**40, 2**63])
    return struct.pack("<Q", length) + header + body


def test_five_hundred_mutations_give_clear_errors_or_success(path: Path) -> None:
    config = json.dumps({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"^a": 2}})
    tensors = {**pair("transformer.a", 2, 4, 3), **pair("transformer.b", 2, 4, 3)}
    tensors["transformer.a.alpha"] = ("F32", ())
    metadata = {METADATA_KEY: RECIPE.to_json(), "lora_adapter_metadata": config}
    original = safetensors_bytes(tensors, metadata)
    base = {"a.weight": (3, 4), "b.weight": (3, 4)}
    rng = random.Random(2)
    refusals: list[str] = []
    for _ in range(500):
        path.write_bytes(mutated(original, rng))
        try:
            report = inspect_adapter(path)
            json.dumps(report.to_dict(), allow_nan=False)
            report.to_text().encode("utf-8")
            check_coverage(read_header(path), base)
        except (AdapterError, RecipeError) as error:
            refusals.append(str(error))
    assert 200 < len(refusals) < 480
    assert not [text for text in refusals if "\n" in text or len(text) > 1000]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"default_steps": 2', '"default_steps": ' + "9" * 5000),
        ("1000.0", "1e999"),
        ("1000.0", "1" + "0" * 400),
        ('"grids": [', '"grids": [' + "[" * 100_000),
        ('"num_train_timesteps": 1000', '"num_train_timesteps": 1' + "0" * 400),
    ],
)
def test_hostile_recipes_are_recipe_errors(path: Path, old: str, new: str) -> None:
    text = RECIPE.to_json()
    assert old in text
    path.write_bytes(safetensors_bytes({}, {METADATA_KEY: text.replace(old, new, 1)}))
    with pytest.raises(FewstepError):
        read_header(path).recipe()


def test_inspecting_a_large_header_needs_no_torch(path: Path) -> None:
    tensors: dict[str, Spec] = {}
    for block in range(60):
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"):
            tensors |= pair(f"transformer.transformer_blocks.{block}.attn.{name}", 2, 64, 64)
    path.write_bytes(safetensors_bytes(tensors, {METADATA_KEY: RECIPE.to_json()}))
    assert inspect_adapter(path).num_modules == 420
    code = (
        "import sys; from fewstep.adapters import inspect_adapter; "
        f"inspect_adapter({str(path)!r}).to_text(); "
        "print(sorted({'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
