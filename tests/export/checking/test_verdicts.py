"""Which folders are verified, which are refused, and what their manifests say of it."""

import io
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from rich.console import Console

from fewstep.digits.weights import teacher_folder
from fewstep.errors import ExportError, ExportFolderError
from fewstep.export.checking.gate import Examination, examine
from fewstep.export.checking.limits import EIGHT_BITS, FLOAT16, FLOAT32, LIMITS, NO_NUMBER, SLOWER
from fewstep.export.checking.reference import Reference, doubts_of, folder_reference, onnx_loader
from fewstep.export.gate import check_graphs
from fewstep.export.merging import load_merged
from fewstep.export.quantizing.command import QuantizeOptions
from fewstep.export.quantizing.command import run as quantize
from fewstep.export.quantizing.plan import Plan
from fewstep.export.quantizing.quantized_folder import quantize_into
from fewstep.export.quantizing.schemes import Int8Static
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import FILE, Precision, read_manifest
from tests.digits_exports import exported
from tests.export.checking.asked import known_as, timed, told, with_weight
from tests.export.quantizing.folders import PROMPTS, copied, prompts_file, source


def in_precision(**precisions: Precision) -> ExportFolder:
    """The float folder, said to be in others."""
    manifest = source().manifest
    graphs = {n: replace(manifest.graphs[n], precision=p) for n, p in precisions.items()}
    return replace(source(), manifest=replace(manifest, graphs={**manifest.graphs, **graphs}))


def looked(folder: ExportFolder, reference: ExportFolder) -> Examination:
    loader = onnx_loader(folder, 1)
    other = Reference("another", loader, folder=reference)
    return Examination(folder, loader, other, (), lambda what: None)


class TestReferences:
    def test_a_folder_is_not_its_own(self, tmp_path: Path) -> None:
        folder, link = copied(tmp_path / "out"), tmp_path / "link"
        with_weight(folder, 1.5)
        before = (folder / "manifest.json").read_bytes()
        os.symlink(folder, link)
        for same in (folder, link, folder / ".." / "out"):
            with pytest.raises(ExportError, match="was given as its own reference"):
                told(folder, against=same, rewrite=True)
        assert (folder / "manifest.json").read_bytes() == before

    @pytest.mark.parametrize("verified", [True, False])
    def test_only_a_verified_one_verifies(self, tmp_path: Path, verified: bool) -> None:
        folder = known_as(tmp_path / "out", verified=False)
        reference = known_as(tmp_path / "reference", verified=verified)
        with timed(1.0):
            said = told(folder, against=reference)
        assert read_manifest(folder).verified == verified
        assert ("reference (fp32) is not verified itself" in said) != verified

    def test_a_damaged_one_is_no_measure(self, tmp_path: Path) -> None:
        reference = copied(tmp_path / "reference")
        data = reference / "transformer/model.onnx_data"
        content = bytearray(data.read_bytes())
        content[5000] ^= 255
        data.write_bytes(content)
        with pytest.raises(ExportFolderError, match="its checksum differs"):
            folder_reference(reference)

    def test_a_coarser_one_does_not_verify(self) -> None:
        whole = replace(source(), manifest=replace(source().manifest, verified=True))
        coarse = in_precision(transformer="int4", vae_decoder="int8-static")
        coarse = replace(coarse, manifest=replace(coarse.manifest, verified=True))
        assert doubts_of(whole, Reference("pipeline", onnx_loader(whole))) == ()
        assert doubts_of(coarse, Reference("float", onnx_loader(whole), folder=whole)) == ()
        assert doubts_of(coarse, Reference("same", onnx_loader(whole), folder=coarse)) == ()
        other = in_precision(transformer="int8-dynamic", vae_decoder="int8-dynamic")
        (said,) = doubts_of(other, Reference("coarse", onnx_loader(whole), folder=coarse))
        assert "the reference's transformer is in int4, coarser than int8-dynamic" in said

    def test_one_that_lacks_a_component_says_nothing_of_it(self) -> None:
        manifest = source().manifest
        graphs = {n: g for n, g in manifest.graphs.items() if n not in ("vae_encoder", "fused")}
        less = replace(source(), manifest=replace(manifest, graphs=graphs, verified=True))
        (said,) = doubts_of(source(), Reference("less", onnx_loader(less), folder=less))
        assert said == "not called verified: the reference has no vae_encoder"


class TestNumbersThatAreNone:
    def test_a_refused_folder_stays_readable(self, tmp_path: Path) -> None:
        folder = copied(tmp_path / "out")
        with_weight(folder, np.nan)
        for _ in range(2):
            with pytest.raises(ExportError, match="relative error no number, wanted at most 0.001"):
                told(folder, against=source().root, rewrite=True)
            manifest = ExportFolder.open(folder, verify=True).manifest
            assert not manifest.verified
            bad = {m.what for m in manifest.measured if m.value == NO_NUMBER}
            assert bad == {"transformer", "latents"}

    def test_forced_through_the_export_they_are_in_the_manifest(self, tmp_path: Path) -> None:
        folder = copied(tmp_path / "out")
        merged = load_merged(teacher_folder("sd3"), exported("sd3").adapter, None)
        with_weight(folder, np.inf)
        manifest = replace(read_manifest(folder), measured=())
        with pytest.raises(ExportError, match="transformer or its network gives NaN or infinity"):
            check_graphs(merged, folder, manifest, force=False, progress=lambda _: None)
        made = check_graphs(merged, folder, manifest, force=True, progress=lambda _: None)
        assert not made.verified
        (folder / FILE).write_text(made.to_json(), encoding="utf-8")
        assert read_manifest(folder).measured == made.measured
        assert {m.value for m in made.measured if m.what == "transformer"} == {NO_NUMBER}


class TestLimits:
    def test_they_are_those_of_the_coarsest_graph_that_changed(self) -> None:
        made = ExportFolder.open(small_decoder())
        look = looked(made, source())
        assert look.changed == ("vae_decoder",)
        assert made.manifest.precision == "fp32"  # of the denoiser
        assert look.limits == EIGHT_BITS
        assert LIMITS[look.precision_of("vae_decoder")].component is None
        assert LIMITS[look.precision_of("transformer")] == FLOAT32

    def test_without_a_change_they_are_the_folders_own(self) -> None:
        assert looked(source(), source()).limits == FLOAT32
        both = in_precision(transformer="int4"), in_precision(transformer="int4")
        assert looked(*both).limits == LIMITS["int4"]

    def test_a_float_reference_that_is_no_better_widens_them(self) -> None:
        half = {n: "fp16" for n in source().manifest.graphs}
        look = looked(source(), in_precision(**half))  # pyright: ignore[reportArgumentType]
        assert {look.precision_of(n) for n in look.components_there} == {"fp16"}
        assert look.limits == FLOAT16
        assert look.own_precision == "fp32"

    def test_a_quantized_decoder_is_judged_as_one(self) -> None:
        made = ExportFolder.open(small_decoder())
        with timed(1.0):
            found = examine(made, folder_reference(source().root, threads=1), PROMPTS, threads=1)
        assert found.missed == ()
        assert found.label == "this int8-static folder"
        errors = [m for m in found.measured if m.unit == "relative error"]
        decoder = [m for m in errors if m.what == "vae_decoder"]
        assert max(m.value for m in decoder) > 1e-3  # what float32 would be refused for
        assert {m.limit for m in decoder} == {None}


@cache
def small_decoder() -> Path:
    """The float folder with its decoder alone in 8 bits."""
    folder = Path(mkdtemp(prefix="fewstep-test-"))
    plan = Plan(Int8Static(), ("vae_decoder",), parse_skips([]), PROMPTS[:2], threads=1)
    quantize_into(source(), folder, plan, progress=lambda _: None)
    return folder


class TestTimes:
    def test_what_is_slower_is_not_published(self, tmp_path: Path) -> None:
        asked = QuantizeOptions(
            folder=source().root,
            out=tmp_path / "out",
            precision="int8-dynamic",
            prompts=prompts_file(),
            threads=1,
        )
        said = r"refused: .*transformer takes 2 x .*at most 1\.05; picture takes 2 x .*--force"
        with timed(2.0), pytest.raises(ExportError, match=said):
            quantize(asked, Console(file=io.StringIO()))
        assert list(tmp_path.iterdir()) == []

    def test_every_changed_graph_and_the_picture_have_a_limit(self, tmp_path: Path) -> None:
        folder = copied(tmp_path / "out")
        with_weight(folder, 1.001)
        with timed(1.06), pytest.raises(ExportError, match="takes 1.06 x"):
            told(folder, against=source().root, rewrite=True)
        ratios = [m for m in read_manifest(folder).measured if m.unit == "ratio of time"]
        assert {(m.what, m.limit) for m in ratios} == {
            ("transformer", SLOWER),
            ("picture", SLOWER),
            ("fused", SLOWER),
        }
