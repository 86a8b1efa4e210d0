"""Damaged and foreign folders are one sentence each."""

import json
import shutil
from pathlib import Path

import pytest

from fewstep.errors import ExportFolderError, FewstepError, RecipeVersionError
from fewstep.export.checking.limits import is_within
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.manifest import Manifest, read_manifest
from tests.digits_exports import exported


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(exported("sd3").folder, copy)
    return copy


def said(folder: Path, **options: bool) -> str:
    with pytest.raises(FewstepError) as caught:
        ExportFolder.open(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def change(folder: Path, **values: object) -> None:
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, **values}))


def test_a_manifest_reads_back(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert json.loads(manifest.to_json())["family"] == "sd3"
    assert isinstance(manifest, Manifest)
    missed = [m for m in manifest.measured if not is_within(m) and m.unit != "ratio of time"]
    assert missed == []
    assert {"image", "latents", "transformer", "fused"} <= {m.what for m in manifest.measured}
    where = {m.where.partition(",")[0] for m in manifest.measured if m.what == "image"}
    assert where == {"one picture", "odd aspect", "longest prompt", "3 prompts"}  # those given
    assert {"transformer", "vae_decoder", "fused"} <= set(manifest.graphs)


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    assert "does not exist" in said(tmp_path / "nowhere")
    assert "has no manifest.json" in said(tmp_path)


def test_cut_weights(folder: Path) -> None:
    data = folder / "transformer" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-100])
    assert "transformer/model.onnx_data" in said(folder)


def test_changed_weights_are_found_when_asked(folder: Path) -> None:
    data = folder / "transformer" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    ExportFolder.open(folder)
    assert "its checksum differs" in said(folder, verify=True)


def test_missing_file(folder: Path) -> None:
    (folder / "vae_decoder" / "model.onnx").unlink()
    assert "vae_decoder/model.onnx is missing" in said(folder)


def test_newer_formats(folder: Path) -> None:
    change(folder, format="fewstep.export/2", novelty=1)
    assert "fewstep.export/2" in said(folder)
    change(folder, format="something else")
    assert "is this a folder of" in said(folder)


def test_newer_recipe(folder: Path) -> None:
    file = folder / "fewstep_recipe.json"
    text = file.read_text().replace("fewstep.recipe/1", "fewstep.recipe/2")
    file.write_text(text)
    with pytest.raises(RecipeVersionError, match="upgrade"):
        ExportFolder.open(folder)


def test_unknown_key_and_no_json(folder: Path) -> None:
    change(folder, novelty=1)
    assert "unknown key manifest.novelty" in said(folder)
    (folder / "manifest.json").write_text("{")
    assert "is not JSON" in said(folder)


def test_unknown_family(folder: Path) -> None:
    change(folder, family="hunyuan")
    with pytest.raises(FewstepError, match="holds a hunyuan model"):
        FewStepRuntime.load(folder, provider="cpu")


def test_damaged_graph(folder: Path) -> None:
    size = (folder / "transformer" / "model.onnx").stat().st_size
    (folder / "transformer" / "model.onnx").write_bytes(b"\x00" * size)
    with pytest.raises(ExportFolderError, match="cannot be loaded"):
        FewStepRuntime.load(folder, provider="cpu", has_cache=False)("a")


def test_damaged_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_bytes(b"{" * file.stat().st_size)
    with pytest.raises(ExportFolderError, match="the tokenizer in"):
        FewStepRuntime.load(folder, provider="cpu", has_cache=False)("a")
