"""`fewstep export quantize`: published, refused, or not begun; never half."""

import errno
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from fewstep.errors import (
    ExportError,
    ExportFolderError,
    FewstepError,
    RecipeVersionError,
    RuntimeSettingError,
)
from fewstep.export.checking.limits import LIMITS, SLOWER, Limits
from fewstep.export.quantizing.command import QuantizeOptions, run
from fewstep.export.writing import check_report
from fewstep.runtime.export_folder import ExportFolder, file_sha256
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from fewstep.runtime.manifest import read_manifest
from tests.export.quantizing.folders import copied, prompts_file, source


def options(folder: Path, out: Path, **changes: object) -> QuantizeOptions:
    known: dict[str, object] = {
        "precision": "int8-dynamic",
        "prompts": prompts_file(),
        "threads": 1,
    }
    return QuantizeOptions(folder=folder, out=out, **(known | changes))  # pyright: ignore[reportArgumentType]


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def nothing_is_left(folder: Path) -> bool:
    return [path.name for path in folder.iterdir() if path.name != "source"] == []


def test_a_published_folder_draws_and_says_what_was_measured(tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.html"
    told = console()
    # forced: whether 8 bits are faster is the machine's affair, what is written is ours
    run(options(source().root, out, force=True, report=report), told)
    opened = ExportFolder.open(out, verify=True)
    units = {one.unit for one in opened.manifest.measured}
    assert {"dB", "SSIM", "ratio of time", "relative error", "ms"} <= units
    changed = {n for n, g in opened.manifest.graphs.items() if g.precision == "int8-dynamic"}
    assert changed == {"transformer"}
    ratios = [m for m in opened.manifest.measured if m.unit == "ratio of time"]
    for what in ("picture", *changed):
        assert {one.limit for one in ratios if one.what == what} == {SLOWER}
    fast = all(one.value <= SLOWER for one in ratios if one.limit is not None)
    # it is right in every other figure
    assert opened.manifest.verified == (fast and source().manifest.verified)
    assert "x); 31 layers quantized, 1 stay float" in told.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    pixels = FewStepRuntime.load(out, provider="cpu", has_cache=False)("a seven", seed=1).pixels
    assert pixels.std() > 1
    assert "without a fused graph: draw from the components" in told.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "fused_steps" not in opened.manifest.settings
    with pytest.raises(RuntimeSettingError, match="int8-dynamic and has no fused graph; quantize"):
        FusedRuntime.load(out)
    page = report.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 12
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)  # nothing is fetched


def test_the_fused_graph_comes_when_asked_for(tmp_path: Path) -> None:
    out, told = tmp_path / "out", console()
    run(options(source().root, out, fused=True, force=True), told)
    manifest = ExportFolder.open(out, verify=True).manifest
    assert {"fused", "image", "transformer"} <= {one.what for one in manifest.measured}
    assert FusedRuntime.load(out, has_cache=False)("a seven", seed=1).pixels.std() > 1
    assert "without a fused graph" not in told.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_one_that_differs_too_much_is_refused_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = Limits(component=None, latents=1e-6, psnr_db=90.0, ssim=0.5)
    monkeypatch.setitem(LIMITS, "int4", strict)
    said = r"this int4 folder is refused: .*image \(.*\) has dB [\d.]+, wanted at least 90"
    with pytest.raises(ExportError, match=said) as caught:
        run(options(source().root, tmp_path / "out", precision="int4"), console())
    assert "latents" in str(caught.value)
    assert "SSIM" not in str(caught.value)
    assert nothing_is_left(tmp_path)


def test_skips_by_sensitivity_are_recorded(tmp_path: Path) -> None:
    asked = options(
        source().root, tmp_path / "out", precision="int4", skip=("attn", "ff", "auto:1"), force=True
    )
    run(asked, console())
    one = json.loads((tmp_path / "out/quantization.json").read_text())["components"][0]
    worst = one["sensitivities"]["layers"][0]["layers"][0]
    assert worst in one["skipped"]
    assert len(one["quantized"]) == len(one["sensitivities"]["layers"]) - 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "int4", "activations": "uint16"}, "--activations is of int8-static"),
        ({"precision": "int4", "block": 48}, "--block is 48"),
        ({"precision": "int4", "fused": True}, "--fused got int4"),
        ({"distil": 5}, "give its --base"),
        ({"distil": -1}, "--distil is -1"),
        ({"components": "vae"}, "has no 'vae'"),
        ({"skip": (".*",)}, "leaves none of"),
        ({"prompts": Path("missing.txt")}, "missing.txt cannot be read"),
    ],
)
def test_requests_that_cannot_be_served(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        run(options(source().root, tmp_path / "out", **changes), console())
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("inside", ["report.html", "pages/report.html", "../out/report.html", "."])
def test_a_report_in_the_folder_that_is_replaced_is_refused(tmp_path: Path, inside: str) -> None:
    out = tmp_path / "out"
    asked = options(Path("not-opened"), out, report=out / inside, overwrite=True)
    with pytest.raises(ExportError, match="--report .* is inside --out .*, which is replaced"):
        run(asked, console())
    assert nothing_is_left(tmp_path)
    check_report(tmp_path / "out.html", out)


def test_a_recipe_of_a_newer_major_is_refused(tmp_path: Path) -> None:
    recipe = copied(tmp_path / "source") / "fewstep_recipe.json"
    text = recipe.read_text().replace("fewstep.recipe/1", "fewstep.recipe/2")
    recipe.write_text(text)
    manifest = tmp_path / "source/manifest.json"
    told = json.loads(manifest.read_text())
    told["files"]["fewstep_recipe.json"] = {
        "bytes": recipe.stat().st_size,
        "sha256": file_sha256(recipe),
    }
    manifest.write_text(json.dumps(told))
    with pytest.raises(RecipeVersionError):
        run(options(tmp_path / "source", tmp_path / "out"), console())
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "changed", "manifest"])
def test_a_damaged_source_leaves_nothing(tmp_path: Path, damage: str) -> None:
    folder = copied(tmp_path / "source")
    file = folder / ("manifest.json" if damage == "manifest" else "transformer/model.onnx_data")
    content = bytearray(file.read_bytes())
    content[5000] ^= 255
    file.write_bytes(bytes(content[:-9]) if damage != "changed" else bytes(content))
    with pytest.raises(ExportFolderError) as caught:
        run(options(folder, tmp_path / "out"), console())
    assert "\n" not in str(caught.value).strip()
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("full_at", [1, 3])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    import shutil

    copy, count = shutil.copyfile, 0

    def full(*given: object) -> object:
        nonlocal count
        count += 1
        if count == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(*given)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ExportError, match="could not be written.*No space left.*nothing was left"):
        run(options(source().root, tmp_path / "out"), console())
    assert nothing_is_left(tmp_path)


def test_the_source_is_never_touched(tmp_path: Path) -> None:
    folder = copied(tmp_path / "source")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    run(options(folder, tmp_path / "out", precision="int4", force=True), console())
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert read_manifest(folder).precision == "fp32"


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(FewstepError, match="is not empty"):
        run(options(source().root, tmp_path / "out"), console())
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
