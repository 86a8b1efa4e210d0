"""Which families have a fused graph, and that it draws what their components draw."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from fewstep.errors import ExportError
from fewstep.export.families.registry import FAMILIES, family_of
from fewstep.export.fused.fusing import add_fused, check_can_be_fused
from fewstep.export.fused.graph_array import GraphArray
from fewstep.export.fused.recorded import RecordedSession
from fewstep.export.fused.recorder import FREE, Recorder
from fewstep.export.onnx_folder import write_manifest
from fewstep.export.optimising import make_graph
from fewstep.export.part import Part, Port
from fewstep.export.writing import graph_entry, save_graph
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from tests.export.tiny_exports import EXPORTS, TinyExport, exported

CAN_BE_FUSED = {"sd15", "sdxl", "sd3", "flux"}
PROMPTS = ("a red cat", "two big blue dogs run", "")


def fused_of(name: str, folder: Path) -> Path:
    """The tiny export of a name with its fused graph."""
    shutil.copytree(exported(name), folder)
    opened = ExportFolder.open(folder)
    write_manifest(folder, add_fused(folder, opened.manifest, opened.recipe, None))
    return folder


def every(can_be_fused: bool) -> list[Any]:
    chosen = [e for e in EXPORTS if (e.family in CAN_BE_FUSED) == can_be_fused]
    return [pytest.param(export, id=export.name) for export in chosen]


def test_families_say_whether_they_have_a_fused_graph() -> None:
    assert {family.name for family in FAMILIES if family.can_be_fused} == CAN_BE_FUSED


@pytest.mark.parametrize("export", every(False))
def test_one_that_has_none_is_refused_by_its_class_alone(export: TinyExport) -> None:
    name = type(export.build()).__name__
    with pytest.raises(ExportError, match=f"{export.family} .*; leave out --fused") as caught:
        check_can_be_fused(name, export.recipe(), None)
    assert family_of(name).not_fused in str(caught.value)


def test_a_name_of_a_dim_means_one_size_in_all_of_the_graph(tmp_path: Path) -> None:
    """Of two encoders with prompts of 3 and 5 tokens; ONNX Runtime shares memory by these names."""
    dims = ("batch_size", "sequence_length", "4")
    sizes = {"batch_size": 2, "sequence_length": 7}
    part = Part(
        "one",
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)),
        (Port("input", dims),),
        (Port("output", dims),),
        {},
        sizes,
    )
    model = make_graph(part, opset=18)
    save_graph(model, tmp_path)
    entry, recorder = graph_entry(model, part, precision="fp32"), Recorder()
    told: dict[str, set[Any]] = {}
    for name, length in (("one", 3), ("other", 5)):
        shape, before = (FREE, length, 4), len(recorder.nodes)
        value = recorder.input(name, ir.DataType.FLOAT, shape)
        feeds: Any = {"input": GraphArray(recorder, value, shape, np.float32)}
        RecordedSession(recorder, name, entry, tmp_path / "model.onnx").run(feeds)
        shapes = [out.shape for node in recorder.nodes[before:] for out in node.outputs]
        told[name] = {str(dim) for shape in shapes if shape is not None for dim in shape}
    assert told["one"] & told["other"] == {"batch_size", "4"}
    assert any("3" in dim for dim in told["one"])


@pytest.mark.slow
@pytest.mark.parametrize("export", every(True))
def test_one_that_has_one_draws_the_components_pictures(export: TinyExport, tmp_path: Path) -> None:
    folder = fused_of(export.name, tmp_path / "fused")
    components = FewStepRuntime.load(folder, provider="cpu", has_cache=False, threads=1)
    fused = FusedRuntime.load(folder, provider="cpu", has_cache=False)
    for batch in (1, 3):
        prompts = list(PROMPTS[:batch])
        wanted = components(prompts, seed=7).pixels.astype(int)
        assert wanted.std() > 1
        assert np.abs(fused(prompts, seed=7).pixels - wanted).max() <= 1
