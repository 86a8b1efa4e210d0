"""A Wan becomes a folder on the command line: checked as clips, drawn as clips."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fewstep.cli.main import main
from fewstep.errors import ExportError
from fewstep.export.checking.command import CheckOptions, run
from fewstep.export.checking.drawing import cases_of
from fewstep.export.checking.limits import EQUAL_DB, FLOAT32, is_within
from fewstep.export.checking.parity import compare_pictures
from fewstep.export.fused.fusing import add_fused
from fewstep.export.onnx_command import OnnxOptions
from fewstep.export.onnx_command import run as export
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.manifest import read_manifest
from tests.expert_files import expert_folder
from tests.export.tiny_exports import BY_NAME
from tests.runtime.clip_manifest import manifest_of
from tests.tiny_pipelines import WAN22


def folder() -> ExportFolder:
    return ExportFolder(Path(), manifest_of("transformer"), BY_NAME["wan21"].recipe())


def test_cases_are_small_and_short() -> None:
    one, odd, long = cases_of(folder(), ["a", "b", "c"])
    assert {case.frames for case in (one, odd, long)} == {9}
    assert [case.size for case in (one, odd, long)] == [(112, 208), (112, 144), (112, 208)]
    assert [len(case.prompts) for case in (one, odd, long)] == [1, 2, 1]


def test_the_worst_picture_of_a_clip_counts() -> None:
    case = cases_of(folder(), ["a"])[0]
    pixels = np.random.default_rng(0).integers(0, 255, (1, 3, 16, 16, 3)).astype(np.uint8)
    largest, psnr, ssim = compare_pictures(case, pixels, pixels, FLOAT32)
    assert (largest.value, psnr.value, ssim.value) == (0, EQUAL_DB, 1)
    assert psnr.where == "one clip, 112x208, 9 frames"
    other = pixels.copy()
    other[0, 2] = 255 - other[0, 2]
    assert not is_within(compare_pictures(case, pixels, other, FLOAT32)[1])


def test_clips_are_not_fused() -> None:
    with pytest.raises(ExportError, match="leave out --fused"):
        add_fused(Path(), folder().manifest, folder().recipe, None)


@pytest.mark.slow
def test_a_wan_with_experts_is_exported_checked_and_drawn(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    BY_NAME["wan22"].pipeline().save_pretrained(base)
    (tmp_path / "adapters").mkdir()
    adapter, _ = expert_folder(WAN22, tmp_path / "adapters", own_networks=True)
    console = Console(file=io.StringIO())
    options = OnnxOptions(
        base=str(base), adapter=str(adapter), out=out, report=tmp_path / "page.html", force=True
    )
    export(options, console)
    manifest = read_manifest(out)
    assert manifest.experts == ("transformer", "transformer_2")
    assert list(manifest.graphs) == ["text_encoder", *manifest.experts, "vae_decoder"]
    # on a machine at work the time may be missed
    assert {m.unit for m in manifest.measured if not is_within(m)} <= {"ratio of time"}
    shown = {m.where for m in manifest.measured if m.what == "image"}
    assert "odd aspect, 112x144, 9 frames" in shown
    assert (tmp_path / "page.html").is_file()
    with suppress(ExportError):
        run(CheckOptions(folder=out, base=str(base), adapter=str(adapter)), console)
    checked = read_manifest(out).measured
    assert {m.unit for m in checked if not is_within(m)} <= {"ratio of time"}
    _draw_and_compare(out, tmp_path / "clips")


def _draw_and_compare(folder: Path, clips: Path) -> None:
    given = ["draw", str(folder), "--prompt", "a red cat", "--seed", "3", "--provider", "cpu"]
    assert main([*given, "--size", "64x96", "--frames", "5", "--out", str(clips)]) == 0
    runtime = FewStepRuntime.load(folder, provider="cpu", has_cache=False)
    wanted = runtime("a red cat", seed=3, size=(64, 96), frames=5).pixels[0]
    with Image.open(clips / "0000-seed3.webp") as image:
        for index, pixels in enumerate(wanted):
            image.seek(index)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


@pytest.mark.slow
def test_one_graph_for_all_of_a_wan_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    base = tmp_path / "base"
    BY_NAME["wan21"].pipeline().save_pretrained(base)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(BY_NAME["wan21"].recipe().to_json(), encoding="utf-8")
    options = OnnxOptions(base=str(base), recipe=recipe, out=tmp_path / "out", fused=True)
    with pytest.raises(ExportError, match="leave out --fused"):
        export(options, Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
