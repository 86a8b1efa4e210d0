"""fused/model.onnx: token ids and noise in, finished pictures out; ONNX Runtime alone runs it.

The runtime's own hosts, step loop and rounding are run on arrays that record (`graph_array`), so
the fused graph computes what the runtime computes. What depends on nothing but the step (time
embeddings) is computed once and stored, where that cannot tip a rounding.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from fewstep import __version__
from fewstep.errors import ExportError
from fewstep.export.families.registry import family_of
from fewstep.export.fused.folding import drop_notes, fold_constants, keep_one_row
from fewstep.export.fused.graph_array import GraphArray
from fewstep.export.fused.recorded import RecordedNoise, RecordedSession, RecordedTokenizer
from fewstep.export.fused.recorder import FREE, Recorder
from fewstep.export.writing import save_graph
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_plan import first_noise_scale, plan_steps
from fewstep.runtime.hosts.host import Parts
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import Graph, Manifest, Precision, Tensor
from fewstep.runtime.pictures import to_uint8
from fewstep.runtime.sampling_loop import Guided, Loop, is_guided
from fewstep.runtime.tokens import PromptTokenizer

NAME = "fused"
FLOATS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


def add_fused(
    folder: Path, manifest: Manifest, recipe: FewStepRecipe, num_steps: int | None
) -> Manifest:
    """Write fused/model.onnx into an export folder.

    Args:
        folder: Holds the components.
        manifest: Of the folder.
        recipe: Unrolled.
        num_steps: Step count; None takes the recipe's.

    Returns:
        The manifest with the fused graph.

    Raises:
        ExportError: The recipe guides, or the family's host does what no graph can hold.
        RecipeError: The model was not made for this step count.
    """
    check_can_be_fused(manifest.pipeline, recipe, num_steps)
    recorder = Recorder()
    opset = max(graph.opset for graph in manifest.graphs.values())
    pixels = _record(recorder, folder, manifest, recipe, num_steps)
    pixels.value.name = "images"
    pixels.value.type = ir.TensorType(ir.DataType.UINT8)
    pixels.value.shape = ir.Shape([recorder.batch, *pixels.shape[1:]])
    graph = recorder.graph(NAME, [pixels.value], opset)
    model = ir.Model(graph, ir_version=10, producer_name="fewstep", producer_version=__version__)
    keep_one_row(model.graph)
    if rounds(manifest):
        drop_notes(model.graph)
    else:
        fold_constants(model)
    save_graph(model, folder / NAME)
    entry = Graph(
        file=f"{NAME}/model.onnx",
        inputs=tuple(_entry(recorder, value) for value in recorder.inputs),
        outputs=(Tensor(name="images", dtype="uint8", dims=_dims(recorder, pixels.shape)),),
        opset=opset,
        precision=manifest.precision,
    )
    steps = recipe.default_steps if num_steps is None else num_steps
    return dataclasses.replace(
        manifest,
        graphs={**manifest.graphs, NAME: entry},
        settings={**manifest.settings, "fused_steps": float(steps)},
    )


def check_can_be_fused(pipeline: str, recipe: FewStepRecipe, num_steps: int | None) -> None:
    """Refuse what no fused graph is made of, before the long work begins.

    Args:
        pipeline: Class of the stock pipeline.
        recipe: To be unrolled.
        num_steps: Step count; None takes the recipe's.

    Raises:
        ExportError: The recipe guides, or the family's host does what no graph can hold.
        RecipeError: The model was not made for this step count.
    """
    family = family_of(pipeline)
    if not family.can_be_fused:
        raise ExportError(f"{family.name} {family.not_fused}; leave out --fused")
    if is_guided(recipe):
        raise ExportError(
            "this recipe guides, and a fused graph is for models without; leave out --fused"
        )
    recipe.grid(num_steps)


def rounds(manifest: Manifest) -> bool:
    """Whether a network rounds its activations.

    The last bit of a time embedding then decides which way a rounding goes, so it has to come from
    the kernels that the components run on: ONNX Runtime's, when the graph is loaded.
    """
    return any(graph.precision not in FLOATS for graph in manifest.graphs.values())


def _record(
    recorder: Recorder,
    folder: Path,
    manifest: Manifest,
    recipe: FewStepRecipe,
    num_steps: int | None,
) -> GraphArray:
    sessions: dict[str, RecordedSession] = {}

    def session(name: str) -> Any:
        if name not in sessions:
            graph, experts = manifest.graphs[name], manifest.experts
            twins = [e for e in experts if e in sessions] if name in experts else []
            file = folder / graph.file
            sessions[name] = RecordedSession(recorder, name, graph, file, twins)
        return sessions[name]

    def tokenizer(name: str) -> Any:
        return RecordedTokenizer(recorder, name, PromptTokenizer(folder / name).max_length)

    host = host_of(manifest.family)(manifest, recipe, Parts(session, tokenizer))
    size = host.default_size
    steps = plan_steps(recipe, num_steps, mu=host.shift(size, num_steps))
    condition = host.encode([""])
    shape = host.latent_shape(size)
    draws = 1 + sum(step.needs_noise for step in steps)
    noise: Any = RecordedNoise(recorder, draws, shape)
    first = noise.draw(shape) * np.float32(first_noise_scale(recipe, steps[0].level))
    loop = Loop(
        host=host,
        denoisers=tuple(session(name) for name in host.denoisers),
        plan=steps,
        guided=Guided(condition, None, 1.0),
        size=size,
        noise=noise,
        told=lambda index, count, x0: None,
        stop=None,
    )
    found: Any = to_uint8(host.decode(loop.run(first)))
    return found


def _entry(recorder: Recorder, value: ir.Value) -> Tensor:
    shape = [dim if isinstance(dim, int) else FREE for dim in value.shape or ()]
    dtype = "int64" if value.dtype == ir.DataType.INT64 else "float32"
    return Tensor(name=str(value.name), dtype=dtype, dims=_dims(recorder, shape))


def _dims(recorder: Recorder, shape: Any) -> tuple[str, ...]:
    return tuple(recorder.batch if size == FREE else str(size) for size in shape)
