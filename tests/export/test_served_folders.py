"""What is wrong with an export folder is said before a repository or an engine is made of it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import helper

from fewstep.cli.picture_folder import read_size
from fewstep.errors import ConfigError, RuntimeSettingError
from fewstep.export.__main__ import main
from fewstep.export.tensorrt.command import TensorRtOptions, make_plans
from fewstep.export.tensorrt.sizes import SizeRange
from fewstep.export.writing import DATA, MODEL, stored_files
from fewstep.recipe import SIDECAR_NAME
from fewstep.runtime.manifest import FILE, read_manifest
from tests.export.tensorrt.small_graphs import export_folder

WEIGHTS = f"transformer/{DATA}"
TOKENIZER = "tokenizer/tokenizer.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One component with its weights in a second file, a tokenizer, and every checksum."""
    made = export_folder(tmp_path / "export")
    model = onnx.load(made / "transformer" / MODEL)
    onnx.save(
        model,
        made / "transformer" / MODEL,
        save_as_external_data=True,
        location=DATA,
        size_threshold=0,
    )
    (made / TOKENIZER).parent.mkdir()
    (made / TOKENIZER).write_text("{}")
    enter_sums(made)
    return made


def enter_sums(folder: Path) -> None:
    """As if the folder had been written so."""
    manifest = replace(read_manifest(folder), files=stored_files(folder))
    (folder / FILE).write_text(manifest.to_json())


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def change(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[5] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def delete_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def delete_tokenizer(folder: Path) -> None:
    (folder / TOKENIZER).unlink()


def write_newer_recipe(folder: Path) -> None:
    recipe = json.loads((folder / SIDECAR_NAME).read_text())
    (folder / SIDECAR_NAME).write_text(json.dumps({**recipe, "format": "fewstep.recipe/2"}))
    enter_sums(folder)


def write_other_family(folder: Path) -> None:
    (folder / FILE).write_text(replace(read_manifest(folder), family="hunyuan").to_json())


DAMAGES = [
    (cut, f"{WEIGHTS} in .* bytes where"),
    (change, rf"{WEIGHTS} in .* \(its checksum differs"),
    (delete_weights, f"{WEIGHTS} is missing from"),
    (delete_tokenizer, f"{TOKENIZER} is missing from"),
    (write_newer_recipe, r"fewstep\.recipe/2"),
    (write_other_family, "holds a hunyuan model, and this release runs sd15, "),
]
COMMANDS = {
    "triton": ("--out", "made"),
    "tensorrt": ("--target", "sm90", "--dry-run", "--cache", "made"),
}


@pytest.fixture(params=COMMANDS)
def argv(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> list[str]:
    """A command line that makes something of the folder, below tmp_path."""
    monkeypatch.chdir(folder.parent)
    return [request.param, folder.name, *COMMANDS[request.param]]


def test_a_whole_folder_is_taken(argv: list[str]) -> None:
    assert main(argv) == 0


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_damage_is_one_sentence_and_leaves_nothing(
    argv: list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    damage(folder)
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (sentence,) = printed.err.splitlines()
    assert re.search(said, sentence)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_graph_tensorrt_would_refuse_is_listed_and_fails(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "transformer" / MODEL
    model = onnx.load(file, load_external_data=False)
    model.graph.node.append(helper.make_node("Det", ["mix.weight::T"], ["unused"], name="/det"))
    onnx.save(model, file)
    enter_sums(folder)
    assert main(["tensorrt", str(folder), "--target", "sm90"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "/det: TensorRT has no Det" in printed
    assert "fewstep export: TensorRT would refuse transformer, for the reasons listed above" in (
        printed
    )


def test_sizes_are_height_first_as_in_draw(folder: Path) -> None:
    (plan,) = make_plans(TensorRtOptions(folder=folder, target="sm90", size=("64x128",)))
    assert read_size("64x128") == (64, 128)
    assert plan.ranges["height"] == SizeRange(8, 8, 8)
    assert plan.ranges["width"] == SizeRange(16, 16, 16)
    with pytest.raises(ConfigError, match="--size must be HEIGHTxWIDTH such as 512x768, got 64"):
        make_plans(TensorRtOptions(folder=folder, target="sm90", size=("64",)))


def test_sizes_beyond_the_networks_places_are_no_plan(folder: Path) -> None:
    manifest = read_manifest(folder)
    settings = {**manifest.settings, "largest_side": 128.0}
    (folder / FILE).write_text(replace(manifest, settings=settings).to_json())
    with pytest.raises(RuntimeSettingError, match="size 64x144 cannot be made, this model has"):
        make_plans(TensorRtOptions(folder=folder, target="sm90", size=("64x128", "64x144")))
