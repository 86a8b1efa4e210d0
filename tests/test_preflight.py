"""Preflight: values, dtypes, experts, coverage, and `fewstep inspect`."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fewstep.adapters.expert_tags import PHASE_KEY, expert_tag, expert_tags
from fewstep.adapters.header import read_header
from fewstep.adapters.inspection import inspect_adapter
from fewstep.adapters.opening import open_adapter
from fewstep.adapters.preflight import coverage_of, preflight
from fewstep.adapters.values import check_dtypes, check_values, is_zero
from fewstep.cli.main import main
from fewstep.errors import AdapterError
from tests.tiny_pipelines import SD3, SD15, SDXL, TinyFamily

BASE = {"blocks.0.to_q.weight": (32, 16), "blocks.1.to_q.weight": (32, 16)}


def lora(modules: int = 2, *, prefix: str = "transformer.", **changes: Any) -> dict[str, Any]:
    """Rank 4 on every layer of `BASE`, random."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    for index in range(modules):
        name = f"{prefix}blocks.{index}.to_q"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 16, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    return tensors | changes


def saved(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


# ---- values and dtypes --------------------------------------------------------------------------

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}
BAD = [
    (name, text)
    for name in FLOATS
    for text in ("nan", "inf", "-inf", "-nan")
    if not (name == "F8_E4M3" and "inf" in text)  # that format has no infinity
]


@pytest.mark.parametrize(("dtype", "text"), BAD)
def test_one_bad_number_is_found_and_named(tmp_path: Path, dtype: str, text: str) -> None:
    values = torch.randn(300, 200)
    values[123, 45] = float(text.removeprefix("-")) * (-1 if text.startswith("-") else 1)
    tensors = {"first": torch.randn(7, 3), "bad": values.to(FLOATS[dtype]), "last": torch.randn(2)}
    header = read_header(saved(tmp_path / "a.safetensors", tensors))
    with pytest.raises(AdapterError) as caught:
        check_values(header)
    assert (
        f"'bad' holds NaN or infinity (first at element {123 * 200 + 45} of {dtype} [300, 200])"
        in str(caught.value)
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_test_agrees_with_isfinite_on_every_pattern(tmp_path: Path, dtype: str) -> None:
    """All 2^8 or 2^16 patterns; for wider types, the upper 16 bits with zeros and ones below."""
    kind = FLOATS[dtype]
    width = torch.empty(0, dtype=kind).element_size()
    top = np.arange(2 ** min(8 * width, 16), dtype=np.uint64)
    shift = np.uint64(max(0, 8 * width - 16))
    patterns = np.concatenate(
        [top << shift, (top << shift) + (np.uint64(1) << shift) - np.uint64(1)]
    )
    words = patterns.astype(f"<u{width}")
    values = torch.from_numpy(words.view(np.uint8).copy()).view(kind)
    finite = values.double().isfinite()
    path = tmp_path / "a.safetensors"
    check_values(
        read_header(
            saved(path, {"a": values.view(torch.uint8)[finite.repeat_interleave(width)].view(kind)})
        )
    )
    bad = values.view(torch.uint8)[~finite.repeat_interleave(width)].view(kind)
    assert len(bad) > 0
    for one in bad[:: max(1, len(bad) // 50)]:
        with pytest.raises(AdapterError, match="element 1 of"):
            check_values(
                read_header(saved(path, {"a": torch.stack([torch.ones((), dtype=kind), one])}))
            )


def test_large_finite_numbers_do_not_look_infinite(tmp_path: Path) -> None:
    """Where a sum would overflow."""
    tensors = {
        str(kind): torch.full((1000,), torch.finfo(kind).max, dtype=kind)
        for kind in FLOATS.values()
    }
    check_values(read_header(saved(tmp_path / "a.safetensors", tensors)))


def test_values_are_read_in_pieces(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(8_000_000), "b": torch.ones(8_000_000).half()}
    header = read_header(saved(tmp_path / "a.safetensors", tensors))
    tracemalloc.start()
    try:
        check_values(header)
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()
    tensors["b"][3] = float("nan")
    with pytest.raises(AdapterError, match="'b' holds NaN or infinity .first at element 3 "):
        check_values(read_header(saved(tmp_path / "a.safetensors", tensors)))
    tensors["a"][[7_000_000, 5_000_000]] = float("nan")
    with pytest.raises(AdapterError, match="'a' holds NaN or infinity .first at element 5000000 "):
        check_values(read_header(saved(tmp_path / "a.safetensors", tensors)))


def test_bad_values_are_found_in_pickles_and_across_pieces(tmp_path: Path) -> None:
    values = torch.ones(2, 400_000)
    values[1, 399_999] = float("nan")
    torch.save({"a": torch.ones(3), "b": values}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="'b' holds NaN or infinity .first at element 799999 "):
        check_values(open_adapter(tmp_path / "a.pt"))


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": torch.zeros(1000)})
    header = read_header(path)
    assert is_zero(header, "a")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="has changed"):
        check_values(header)
    with pytest.raises(AdapterError, match="shrank"):
        is_zero(header, "a")


@pytest.mark.parametrize(
    "kind", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_matrices_that_are_no_floats_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = lora()
    name = "transformer.blocks.1.to_q.lora_B.weight"
    tensors[name] = torch.zeros(32, 4).to(kind)
    header = read_header(saved(tmp_path / "a.safetensors", tensors))
    with pytest.raises(AdapterError, match=f"'{name}' is stored as .*, which is no LoRA weight"):
        check_dtypes(header)
    with pytest.raises(AdapterError, match="is no LoRA weight"):
        preflight(header, BASE)


def test_whole_numbers_are_fine_as_alpha(tmp_path: Path) -> None:
    tensors = lora() | {"transformer.blocks.0.to_q.alpha": torch.tensor(8)}
    check_dtypes(read_header(saved(tmp_path / "a.safetensors", tensors)))


# ---- experts ------------------------------------------------------------------------------------

FILE_NAMES = {
    "high_noise_model.safetensors": "high_noise",
    "low_noise_model.safetensors": "low_noise",
    "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors": "high_noise",
    "Wan2.2-Lightning_T2V-A14B-4steps-lora_LOW_fp16.safetensors": "low_noise",
    "Wan_2_2_I2V_A14B_HIGH_lightx2v_MoE_distill_lora_rank_64_bf16.safetensors": "high_noise",
    "style-HighNoise.safetensors": "high_noise",
    "wan22-14B-t2v-h-4step.safetensors": "high_noise",
    "wan2.2_L_detail.safetensors": "low_noise",
    "sdxl_lora_h.safetensors": None,
    "high-res-fix.safetensors": None,
    "low_vram_low_rank.safetensors": None,
    "highlights.safetensors": None,
    "slow_motion.safetensors": None,
    "wan2.2_high_and_low.safetensors": None,
    "adapter.safetensors": None,
}


@pytest.mark.parametrize("name", FILE_NAMES)
def test_experts_are_known_by_the_files_name(tmp_path: Path, name: str) -> None:
    tag = expert_tag(read_header(saved(tmp_path / name, lora())))
    assert (None if tag is None else tag.name) == FILE_NAMES[name]


def test_metadata_wins_over_component_over_name_over_folder(tmp_path: Path) -> None:
    (tmp_path / "high_noise").mkdir()
    path = tmp_path / "high_noise" / "low_noise.safetensors"
    modules = lora(prefix="transformer_2.")
    header = read_header(saved(path, modules, {PHASE_KEY: "details"}))
    assert [tag.name for tag in expert_tags(header)] == ["details", "low_noise", "low_noise"]
    assert "'fewstep.phase'" in expert_tags(header)[0].known_by
    plain = read_header(saved(path.with_name("adapter.safetensors"), lora()))
    assert [(t.name, t.known_by) for t in expert_tags(plain)] == [
        ("high_noise", "its folder's name")
    ]
    both = lora() | lora(prefix="transformer_2.")
    assert expert_tags(read_header(saved(tmp_path / "both.safetensors", both))) == ()


# ---- preflight ----------------------------------------------------------------------------------


def test_a_good_file_is_reported_with_all_its_facts(tmp_path: Path) -> None:
    config = {"transformer.r": 4, "transformer.lora_alpha": 8}
    path = saved(
        tmp_path / "wan2.2_low_noise.safetensors",
        lora(),
        {"lora_adapter_metadata": json.dumps(config)},
    )
    report = preflight(open_adapter(path), BASE)
    assert [(r.rank, r.alpha, r.modules, r.scale) for r in report.ranks] == [(4, 8.0, 2, 2.0)]
    assert report.coverage.ranks == {"blocks.0.to_q": 4, "blocks.1.to_q": 4}
    assert report.coverage.alphas == {"blocks.0.to_q": 8.0, "blocks.1.to_q": 8.0}
    assert (report.dtypes, report.components) == (("F32",), ("transformer",))
    assert report.expert is not None
    assert report.expert.name == "low_noise"
    assert "ComfyUI does not read it" in report.problems[0]


@pytest.mark.parametrize("family", [SD15, SDXL, SD3], ids=lambda f: f.name)
def test_pickles_of_real_models_pass_and_other_families_are_named(
    tmp_path: Path, family: TinyFamily
) -> None:
    name = family.denoisers[0]
    shapes, tensors = {}, {}
    for module, layer in family.build().components[name].named_modules():
        if isinstance(layer, torch.nn.Linear):
            shapes[f"{module}.weight"] = (layer.out_features, layer.in_features)
            tensors[f"{name}.{module}.lora_A.weight"] = torch.ones(2, layer.in_features)
            tensors[f"{name}.{module}.lora_B.weight"] = torch.ones(layer.out_features, 2)
    torch.save(tensors, tmp_path / "a.pt")
    report = preflight(open_adapter(tmp_path / "a.pt"), shapes)
    assert report.coverage.matched == len(shapes)
    assert report.container == "pickle"
    with pytest.raises(AdapterError, match=f"none of {len(shapes)} modules fit this base"):
        preflight(open_adapter(tmp_path / "a.pt"), BASE)


def test_partial_coverage_is_an_error_that_names_the_first_offender(tmp_path: Path) -> None:
    header = open_adapter(saved(tmp_path / "a.safetensors", lora(3)))
    with pytest.raises(
        AdapterError, match="only 2 of 3 modules fit this base; .*'transformer.blocks.2"
    ):
        preflight(header, BASE)
    empty = lora() | {
        "transformer.blocks.9.to_q.lora_A.weight": torch.ones(4, 16),
        "transformer.blocks.9.to_q.lora_B.weight": torch.zeros(32, 4),
    }
    header = open_adapter(saved(tmp_path / "b.safetensors", empty))
    assert coverage_of(header, BASE).matched == 2, "a layer whose product is zero changes nothing"


def test_not_finite_numbers_fail_preflight(tmp_path: Path) -> None:
    tensors = lora()
    tensors["transformer.blocks.1.to_q.lora_A.weight"][3, 15] = float("inf")
    with pytest.raises(
        AdapterError, match="'transformer.blocks.1.to_q.lora_A.weight' holds NaN or"
    ):
        preflight(open_adapter(saved(tmp_path / "a.safetensors", tensors)), BASE)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (0.0, "alpha is 0 in 1 modules, which therefore change nothing"),
        (-4.0, "alpha is negative in 1 modules"),
        (4e6, "alpha / rank is 1e+06 at most"),
    ],
)
def test_odd_scales_are_problems(tmp_path: Path, alpha: float, message: str) -> None:
    tensors = lora() | {"transformer.blocks.0.to_q.alpha": torch.tensor(alpha)}
    report = preflight(open_adapter(saved(tmp_path / "a.safetensors", tensors)), BASE)
    assert any(message in problem for problem in report.problems)


def test_contradicting_tags_are_a_problem(tmp_path: Path) -> None:
    path = saved(tmp_path / "low_noise.safetensors", lora(), {PHASE_KEY: "high_noise"})
    (problem,) = preflight(open_adapter(path), BASE).problems
    assert problem.startswith("'fewstep.phase' in the file's metadata says this is 'high_noise'")


# ---- fewstep inspect ----------------------------------------------------------------------------


def base_folder(folder: Path) -> Path:
    weights = {name: torch.zeros(shape) for name, shape in BASE.items()}
    (folder / "transformer").mkdir(parents=True)
    saved(folder / "transformer" / "model.safetensors", weights)
    return folder


def test_inspect_shows_preflight_facts_of_a_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(lora(), tmp_path / "wan2.2_high_noise.pt")
    base = base_folder(tmp_path / "base")
    command = ["inspect", str(tmp_path / "wan2.2_high_noise.pt"), "--base", str(base), "--values"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for line in (
        " bytes, a pickle",
        "rank      4, alpha not stored (read as the rank), scale 1: 2 modules",
        "for       transformer",
        "expert    high_noise (known by the file's name)",
        "values    all finite",
        "coverage  2 of 2 modules",
    ):
        assert line in text
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["container"], data["errors"], data["values_checked"]) == ("pickle", [], True)
    assert data["expert"] == {"name": "high_noise", "known_by": "the file's name"}


@pytest.mark.parametrize("kind", ["values", "coverage", "dtype"])
def test_inspect_exits_with_2_and_still_prints_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    tensors = lora(3 if kind == "coverage" else 2)
    name = "transformer.blocks.0.to_q.lora_A.weight"
    if kind == "values":
        tensors[name][0, 0] = float("nan")
    if kind == "dtype":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    path = saved(tmp_path / "a.safetensors", tensors)
    command = ["inspect", str(path), "--values", "--base", str(base_folder(tmp_path / "base"))]
    assert main([*command, "--json"]) == 2
    printed = capsys.readouterr()
    (error,) = json.loads(printed.out)["errors"]
    assert printed.err == f"fewstep: {error}\n"
    assert main(command) == 2
    assert f"error     {path}: " in capsys.readouterr().out


def test_inspection_agrees_with_preflight(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", lora())
    report = inspect_adapter(path, base_folder(tmp_path / "base"), values=True)
    checked = preflight(open_adapter(path), BASE)
    assert (report.coverage, report.ranks, report.expert) == (
        checked.coverage,
        checked.ranks,
        checked.expert,
    )
