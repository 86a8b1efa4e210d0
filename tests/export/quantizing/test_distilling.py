"""Training the rounded network brings it nearer to the float one, and the graph is that network."""

from pathlib import Path

import pytest

from fewstep.digits.weights import teacher_folder
from fewstep.errors import ExportError
from fewstep.export.merging import load_merged
from fewstep.export.quantizing.distilling import distil
from fewstep.export.quantizing.plan import Plan
from fewstep.export.quantizing.quantized_folder import quantize_into
from fewstep.export.quantizing.schemes import Int4
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.onnx_session import OnnxLoader
from tests.digits_exports import exported
from tests.export.quantizing.folders import PROMPTS, feeds, relative, source


def graph_error(folder: ExportFolder) -> float:
    """Of the quantized graph on the float student's trajectories."""
    pair = []
    for one in (source(), folder):
        loader = OnnxLoader(one.root, {}, threads=1, has_cache=False)
        pair.append(loader.load(one.manifest.graphs["transformer"]))
    return max(relative(*(s.run(f)["out_hidden_states"] for s in pair)) for f in feeds())


def test_a_few_steps_lower_the_error_of_the_graph(tmp_path: Path) -> None:
    merged = load_merged(teacher_folder("sd3"), exported("sd3").adapter, None)
    plan = Plan(Int4(), ("transformer",), parse_skips([]), PROMPTS, threads=1)
    made = distil(source(), merged, plan, steps=12, progress=lambda _: None)
    assert made.after < 0.9 * made.before
    errors = []
    for name, distilled in (("plain", None), ("trained", made)):
        folder = tmp_path / name
        folder.mkdir()
        taken = Plan(
            plan.scheme, plan.components, plan.skips, PROMPTS, threads=1, distilled=distilled
        )
        quantize_into(source(), folder, taken, progress=lambda _: None)
        errors.append(graph_error(ExportFolder.open(folder)))
    assert errors[1] < errors[0]


def test_only_denoisers_are_trained() -> None:
    merged = load_merged(teacher_folder("sd3"), exported("sd3").adapter, None)
    plan = Plan(Int4(), ("text_encoder",), parse_skips([]), PROMPTS)
    with pytest.raises(ExportError, match="trains denoisers, not text_encoder"):
        distil(source(), merged, plan, steps=1, progress=lambda _: None)
