"""Sizes, profiles, keys and the dry run, all without TensorRT and without a GPU."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from rich.console import Console

from fewstep.errors import ExportError, MissingExtraError, RuntimeSettingError
from fewstep.export.tensorrt.command import TensorRtOptions, make_plans, run
from fewstep.export.tensorrt.memory import estimate_memory
from fewstep.export.tensorrt.plan import BuildSettings
from fewstep.export.tensorrt.profiles import dim_value, make_profile, profile_problems
from fewstep.export.tensorrt.sizes import (
    PictureSize,
    SizeRange,
    parse_named_range,
    parse_range,
    symbol_ranges,
)
from fewstep.export.tensorrt.target import Target, parse_target
from fewstep.runtime.manifest import Manifest, read_manifest
from fewstep.runtime.tensorrt.bfloat16 import from_bfloat16, to_bfloat16
from fewstep.runtime.tensorrt.identity import EngineIdentity, InputRange, Profile
from fewstep.runtime.tensorrt.preflight import check_ort_tensorrt, check_version, require_tensorrt
from tests.export.tensorrt.small_graphs import make_model

RANGES = {"batch_size": SizeRange(1, 1, 4), "height": SizeRange(8, 8, 12)}
RANGES["width"] = SizeRange(8, 8, 8)


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


def test_targets() -> None:
    assert parse_target("sm90") == Target(9, 0)
    assert parse_target("SM_120").sm == "sm120"
    for wrong in ("sm61", "90", "hopper", ""):
        with pytest.raises(ExportError, match="wanted one of sm75"):
            parse_target(wrong)


def test_ranges_and_sizes_are_read() -> None:
    assert parse_range("1:2:8") == SizeRange(1, 2, 8)
    assert parse_range("77") == SizeRange(77, 77, 77)
    assert parse_named_range("step=1:1:4") == ("step", SizeRange(1, 1, 4))
    for parse, wrong in (
        (parse_range, "1:2"),
        (parse_range, "4:2:1"),
        (parse_range, "0:1:1"),
        (parse_named_range, "1:1:4"),
    ):
        with pytest.raises(ExportError):
            parse(wrong)


def test_symbols_follow_from_the_pictures(manifest: Manifest) -> None:
    found = symbol_ranges(
        manifest,
        "transformer",
        sizes=(PictureSize(64, 96), PictureSize(128, 64)),
        batch=SizeRange(1, 2, 4),
        stated={"width": SizeRange(2, 4, 6), "transformer.width": SizeRange(4, 8, 32)},
    )
    assert found == {
        "batch_size": SizeRange(1, 2, 4),
        "height": SizeRange(8, 12, 12),
        "width": SizeRange(4, 8, 32),
    }


def test_sizes_that_do_not_divide(manifest: Manifest) -> None:
    def ranges(width: int, height: int) -> None:
        symbol_ranges(
            manifest,
            "transformer",
            sizes=(PictureSize(width, height),),
            batch=SizeRange(1, 1, 4),
            stated={},
        )

    with pytest.raises(ExportError, match="100 pixels, wanted a multiple of 8; the nearest is 96"):
        ranges(100, 64)
    with pytest.raises(ExportError, match="height of transformer is 9, wanted a multiple of 2"):
        ranges(64, 72)


def test_dims() -> None:
    sizes = {"latent_height": 16, "sample_width": 64}
    assert dim_value("77", sizes) == 77
    assert dim_value("latent_height * 8", sizes) == 128
    assert dim_value("sample_width / 8", sizes) == 8
    with pytest.raises(ExportError, match="wanted a number"):
        dim_value("2*latent_height", sizes)


def test_a_made_profile_agrees_with_its_graph(manifest: Manifest) -> None:
    graph = manifest.graphs["transformer"]
    profile = make_profile(graph, RANGES)
    assert profile_problems(graph, profile) == []
    assert profile.ranges[0].min == (1, 4, 8, 8)
    assert profile.ranges[0].max == (4, 4, 12, 8)
    assert profile.ranges[1].opt == (1,)
    assert profile.holds({"hidden_states": (3, 4, 10, 8), "timestep": (1,)})
    assert not profile.holds({"hidden_states": (3, 4, 13, 8), "timestep": (1,)})


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"min": (5, 4, 8, 8)}, "hidden_states axis 0 is 5:1:4, not ascending"),
        ({"max": (4, 5, 12, 8)}, "hidden_states axis 1 is 4:4:5, the graph has 4"),
        ({"opt": (1, 4, 9, 8)}, "hidden_states axis 2 is 8:9:12, not divisible by 2"),
        ({"min": (1, 4)}, "hidden_states has 4 axes"),
    ],
)
def test_profiles_that_contradict_their_graph(
    manifest: Manifest, changes: dict[str, tuple[int, ...]], wanted: str
) -> None:
    graph = manifest.graphs["transformer"]
    first, second = make_profile(graph, RANGES).ranges
    wrong = Profile(ranges=(dataclasses.replace(first, **changes), second))
    assert profile_problems(graph, wrong) == [wanted]
    assert profile_problems(graph, Profile(ranges=(first,))) == ["no range for timestep"]


def test_one_symbol_has_one_range(manifest: Manifest) -> None:
    graph = manifest.graphs["transformer"]
    tied = dataclasses.replace(graph.inputs[1], dims=("batch_size",))
    graph = dataclasses.replace(graph, inputs=(graph.inputs[0], tied))
    first, second = make_profile(graph, RANGES).ranges
    assert profile_problems(graph, Profile(ranges=(first, second))) == []
    wrong = dataclasses.replace(second, max=(2,))
    (text,) = profile_problems(graph, Profile(ranges=(first, wrong)))
    assert text.startswith("timestep axis 0 is 1:1:2 and hidden_states axis 0 is another range")


def test_every_part_of_an_identity_changes_the_key() -> None:
    entry = InputRange(name="x", min=(1,), opt=(1,), max=(4,))
    identity = EngineIdentity(
        onnx_sha256="a",
        tensorrt="11.4.0.106",
        cuda=13,
        sm="sm90",
        system="linux-x86_64",
        profiles=(Profile(ranges=(entry,)),),
        optimization_level=3,
        workspace_bytes=1,
    )
    changed = {
        "onnx_sha256": "b",
        "data_sha256": "b",
        "adapter_sha256": "b",
        "tensorrt": "10.16.1.11",
        "cuda": 12,
        "sm": "sm89",
        "system": "windows-amd64",
        "flags": ("TF32",),
        "profiles": (Profile(ranges=(dataclasses.replace(entry, max=(5,)),)),),
        "optimization_level": 5,
        "workspace_bytes": 2,
        "refittable": ("w",),
    }
    assert changed.keys() == {field.name for field in dataclasses.fields(identity)}
    keys = {dataclasses.replace(identity, **{k: v}).key for k, v in changed.items()}
    assert len(keys | {identity.key}) == len(changed) + 1
    assert dataclasses.replace(identity).key == identity.key


def test_settings_that_contradict_one_another() -> None:
    with pytest.raises(ExportError, match="wanted 0 to 5"):
        BuildSettings(optimization_level=6)
    with pytest.raises(ExportError, match="give one of them"):
        BuildSettings(strips_weights=True, refit_for=Path("lora"))
    assert BuildSettings(strips_weights=True).flags == ("REFIT_IDENTICAL", "STRIP_PLAN")


def test_memory_is_counted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    model = make_model(nodes, weights={"w": np.ones((4, 4), np.float32)})
    onnx.save(model, tmp_path / "model.onnx")
    counted = estimate_memory(tmp_path / "model.onnx", {"x": (10, 4)})
    one = 10 * 4 * 4
    assert counted.weights == 64
    assert counted.activations == 3 * one  # a, b and c live while c is made
    assert counted.inputs_and_outputs == 3 * one
    assert (counted.unknown, counted.values) == (0, 4)


def test_a_dry_run_needs_neither_tensorrt_nor_a_gpu(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(TensorRtOptions(folder=folder, target="sm90"), Console(width=200))
    text = capsys.readouterr().out
    for wanted in (
        "engine build not verified on this release",
        "TensorRT 11.4.0.106, CUDA 13, sm90",
        "1x4x8x8 | 1x4x8x8 | 4x4x8x8",
        "nothing speaks against it (statically checked)",
        "5 of 5 values counted",
        str(folder / "tensorrt/transformer-sm90-")[-40:],
    ):
        assert wanted in text.replace("\n", "")
    assert not (folder / "tensorrt").exists()


def test_a_dry_run_lists_what_speaks_against_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "transformer/model.onnx"
    model = onnx.load(file)
    model.graph.node.append(helper.make_node("Det", ["mix.weight::T"], ["unused"], name="/det"))
    onnx.save(model, file)
    with pytest.raises(ExportError, match="TensorRT would refuse transformer, for the reasons"):
        run(TensorRtOptions(folder=folder, target="sm90"), Console(width=200))
    assert "/det: TensorRT has no Det" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"components": ("unet",)}, "has no unet; it has transformer"),
        ({"target": "gpu"}, "--target is 'gpu'"),
        ({"build": True, "dry_run": True}, "give one"),
        ({"tensorrt": "9.3.0"}, "fewstep uses 10.12 to 11.x"),
        ({"tensorrt": "new"}, "wanted a version such as"),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, options: dict[str, object], wanted: str) -> None:
    given = {"folder": folder, "target": "sm90"} | options
    with pytest.raises((ExportError, RuntimeSettingError)) as caught:
        run(TensorRtOptions(**given), Console())  # type: ignore[arg-type]
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_building_without_tensorrt_names_the_extra(folder: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"fewstep\[tensorrt\]"):
        make_plans(TensorRtOptions(folder=folder, target="sm90", build=True))


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tensorrt"
    package.mkdir()
    what = "libnvinfer.so.11: cannot open shared object file"
    (package / "__init__.py").write_text(f"raise ImportError({what!r})")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeSettingError, match=r"not found \(libnvinfer.so.11"):
        require_tensorrt()


def test_releases_that_are_not_used() -> None:
    for good in ("10.12.0.36", "11.4.0.106", "11.5.1"):
        check_version(good)
    for wrong in ("10.11.0.33", "8.6.1", "12.0.0"):
        with pytest.raises(RuntimeSettingError, match="fewstep uses 10.12 to 11.x"):
            check_version(wrong)


def test_onnx_runtimes_provider_refuses_tensorrt_11() -> None:
    check_ort_tensorrt("10.16.1.11")
    with pytest.raises(RuntimeSettingError, match="loads TensorRT 10 and TensorRT 11.4.0.106 is"):
        check_ort_tensorrt("11.4.0.106")
    with pytest.raises(RuntimeSettingError, match=r"fewstep\[ort-tensorrt\]"):
        check_ort_tensorrt(None)


def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.normal(size=10_000).astype(np.float32),
            np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 1.00390625], np.float32),
        ]
    )
    wanted = torch.from_numpy(values).bfloat16()
    bits = to_bfloat16(values)
    np.testing.assert_array_equal(from_bfloat16(bits), wanted.float().numpy())


def test_the_runtime_needs_no_onnx(tmp_path: Path) -> None:
    code = (
        "import sys, fewstep.runtime.tensorrt.opening, fewstep.runtime.tensorrt.preflight;"
        "heavy = {'torch', 'onnx', 'tensorrt', 'cuda', 'filelock', 'onnxruntime'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
