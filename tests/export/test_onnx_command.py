"""`fewstep export onnx`: what it refuses at once, what it writes, and precisions made in one go."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fewstep.digits.weights import teacher_folder
from fewstep.errors import ExportError, RecipeError
from fewstep.export.__main__ import main
from fewstep.export.checking import speed
from fewstep.export.onnx_command import OnnxOptions, load
from fewstep.export.onnx_folder import OPSETS, save_companion, without_origin, write_folder
from fewstep.export.optimising import make_graph
from fewstep.export.part import Part, Port
from fewstep.export.quantizing.plan import Plan
from fewstep.export.quantizing.quantized_folder import quantize_into
from fewstep.export.quantizing.schemes import Int8Dynamic
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.export.writing import graph_entry
from fewstep.recipe import Guidance
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import read_manifest
from tests.digits_exports import digits_recipe, exported
from tests.export.quantizing.folders import prompts_file
from tests.trainer import tiny_text


def small_part() -> Part:
    """One Linear."""
    row = ("batch_size", "4")
    inputs, outputs = (Port("input", row),), (Port("output", row),)
    return Part("small", torch.nn.Linear(4, 4), inputs, outputs, {}, {"batch_size": 2})


@pytest.mark.parametrize("opset", OPSETS)
def test_a_graph_is_of_the_opset_asked_for_and_runs(opset: int) -> None:
    part = small_part()
    model = make_graph(part, opset=opset)
    assert graph_entry(model, part, precision="fp32").opset == opset
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    feeds = {name: value.numpy() for name, value in part.example().items()}
    (found,) = session.run(None, feeds)
    wanted = part.module(*part.example().values()).detach().numpy()
    assert abs(found - wanted).max() < 1e-6


def test_the_manifest_has_the_opset_of_the_files() -> None:
    folder = exported("sd3").folder
    for graph in read_manifest(folder).graphs.values():
        model = onnx.load(folder / graph.file, load_external_data=False)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {graph.opset}
    part = small_part()
    model = make_graph(part, opset=18)
    model.opset_imports[""] = 21
    assert graph_entry(model, part, precision="fp32").opset == 21


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--opset", "12"], "opset is 12; graphs are made in 18 to 23, name one of these"),
        (["--opset", "99"], "opset is 99; graphs are made in 18 to 23"),
        (
            ["--fused-steps", "3"],
            "--fused-steps is 3, and no fused graph was asked for; add --fused",
        ),
        (["--report", "out/pages/report.html"], "inside --out out, which is replaced as a whole"),
        (["--precision", "int4", "--fused"], "--fused got int4, whose pixels change"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_base_is_looked_for(
    given: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["onnx", "--base", "./nowhere", "--out", "out", *given]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("fewstep export: ")
    assert said in told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_begun_in_another_opset(tmp_path: Path) -> None:
    nothing: Any = None
    with pytest.raises(ExportError, match="opset is 17; graphs are made in 18 to 23"):
        write_folder(nothing, tmp_path, opset=17, progress=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "steps", "error", "said"),
    [
        ({}, 3, RecipeError, "not made for 3 steps; use 2, 4"),
        (
            {"guidance": Guidance(mode="cfg", scale=5.0)},
            None,
            ExportError,
            "this recipe guides, .* leave out --fused",
        ),
    ],
    ids=["steps", "guidance"],
)
def test_what_no_fused_graph_holds_is_refused_with_the_pipeline_loaded_and_nothing_traced(
    changes: dict[str, Any],
    steps: int | None,
    error: type[Exception],
    said: str,
    tmp_path: Path,
) -> None:
    recipe = replace(digits_recipe("sd3", 0.0), **changes)
    file = tmp_path / "recipe.json"
    file.write_text(recipe.to_json(), encoding="utf-8")
    options = OnnxOptions(base="digits-sd3", recipe=file, out=tmp_path / "out", fused=True)
    with pytest.raises(error, match=said):
        load(replace(options, fused_steps=steps))


def test_nothing_says_where_the_base_lay() -> None:
    made = exported("sd3")
    places = [str(teacher_folder("sd3")).encode(), str(made.adapter.parent).encode()]
    files = [file for file in made.folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        assert not any(place in content for place in places), file
    inner = {"width": 8, "text": {"_name_or_path": "/home/somebody/base", "depth": 2}}
    assert without_origin({**inner, "_name_or_path": "/home"}) == {"width": 8, "text": {"depth": 2}}


def test_a_tokenizer_that_cannot_be_written_is_an_error_of_the_disk(tmp_path: Path) -> None:
    tokenizer = tiny_text.clip_pair()["tokenizer"]
    save_companion(tokenizer, tmp_path / "whole")
    assert (tmp_path / "whole/tokenizer.json").is_file()
    (tmp_path / "taken/tokenizer.json").mkdir(parents=True)  # no file can take this place
    with pytest.raises(OSError, match="Is a directory") as caught:
        save_companion(tokenizer, tmp_path / "taken")
    assert caught.value.errno == 21


@pytest.mark.slow
def test_fewer_bits_in_one_go_are_those_of_two(tmp_path: Path) -> None:
    made, out, report = exported("sd3"), tmp_path / "out", tmp_path / "report.html"
    argv = ["onnx", "--base", "digits-sd3", "--adapter", str(made.adapter), "--out", str(out)]
    argv += ["--precision", "int8-dynamic", "--fused", "--fused-steps", "2", "--force"]
    argv += ["--prompts", str(prompts_file()), "--report", str(report)]
    with patch.object(speed, "BUDGET_S", 0.0):
        assert main(argv) == 0
    manifest = read_manifest(out)
    assert manifest.precision == "int8-dynamic"
    assert manifest.settings["fused_steps"] == 2
    assert "int8-dynamic" in report.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "report.html"]

    source, two = ExportFolder.open(made.folder), tmp_path / "two"
    two.mkdir()
    plan = Plan(Int8Dynamic(), ("transformer",), parse_skips([]), ("a",), threads=1)
    quantize_into(source, two, plan, progress=lambda _: None)
    for name in ("model.onnx", "model.onnx_data"):
        files = [folder / "transformer" / name for folder in (out, two)]
        one, other = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
        assert one == other
