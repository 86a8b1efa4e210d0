"""Quantisation-aware distillation: the rounded student learns to answer as the float one does.

Both see the inputs that the rounded student meets on its own way, recorded anew every few steps.
Only weights (and biases) of the layers that will be quantized are trained; they go back into the
graph by parameter name, which is then quantized as any other.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fewstep.errors import ExportError
from fewstep.export.checking.reference import onnx_loader
from fewstep.export.checking.torch_engine import TorchSession
from fewstep.export.merging import MergedPipeline
from fewstep.export.part import Part
from fewstep.export.quantizing.fake_rounding import activation_rounding, weight_rounding
from fewstep.export.quantizing.layers import layers_of, load_graph, without
from fewstep.export.quantizing.plan import Distilled, Plan
from fewstep.export.quantizing.schemes import Scheme
from fewstep.export.quantizing.trajectories import record
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Graph
from fewstep.runtime.session import Feeds, Loader, Session
from fewstep.runtime.weight_forms import is_phase, parameter_of

ROUND = 25
"""Steps between two recordings."""
BATCH = 8
"""Calls looked at in one step, all at the same level."""
RATE = 2e-4
"""Of Adam, falling to nothing in a straight line."""
HELD_SEED = 10_000
"""First seed of the trajectories that the error is measured on; training draws below and above."""


@dataclass(slots=True)
class StudentLoader:
    """One component run by torch, the others as they are in the folder.

    Attributes:
        own: Of the component.
        others: Loads the rest.
        name: Of the engine.
    """

    own: Session
    others: Loader
    name: str = "student"

    def load(self, graph: Graph) -> Session:
        """See `Loader.load`."""
        return self.own if graph.file == self.own.graph.file else self.others.load(graph)


@dataclass(frozen=True, slots=True)
class Lesson:
    """One component in training.

    Attributes:
        folder: Float folder.
        name: Of the component.
        teacher: Float, frozen.
        student: The same with rounding layers.
        prompts: Where trajectories begin.
        loader: Of the folder.
    """

    folder: ExportFolder
    name: str
    teacher: Part
    student: Part
    prompts: Sequence[str]
    loader: Loader

    def feeds(self, seed: int) -> list[list[Feeds]]:
        """Inputs along the student's own trajectories: per step, one entry per picture."""
        graph = self.folder.manifest.graphs[self.name]
        own = StudentLoader(TorchSession(self.student, graph), self.loader)
        calls = record(self.folder, own, self.prompts, seed=seed)[self.name]
        each = len(calls) // len(self.prompts)
        return [calls[step::each] for step in range(each)]

    def gap(self, feeds: Sequence[Feeds]) -> Tensor:
        """Mean square of the difference, relative to that of the float answer."""
        given = _batch(self.teacher, feeds)
        with torch.no_grad():
            wanted = _first(self.teacher.module(*given))
        found = _first(self.student.module(*given))
        return (found - wanted).square().mean() / wanted.square().mean().clamp_min(1e-12)

    def error(self, feeds: Sequence[Sequence[Feeds]]) -> float:
        """Root mean square of the difference over all steps, relative."""
        with torch.no_grad():
            each = [float(self.gap(some[:BATCH])) for some in feeds]
        return float(np.sqrt(np.mean(each)))


def distil(
    source: ExportFolder,
    merged: MergedPipeline,
    plan: Plan,
    *,
    steps: int,
    progress: Callable[[str], None],
) -> Distilled:
    """Train the layers that will be quantized.

    Args:
        source: Float folder of the same pipeline.
        merged: The pipeline, in float32.
        plan: How it will be quantized, and from which prompts trajectories begin.
        steps: Of training, above 0.
        progress: Told of every recording.

    Raises:
        ExportError: A component is no denoiser, or the folder was not made from this pipeline.
    """
    denoisers = merged.expert_graphs or (merged.family.denoiser,)
    for name in plan.components:
        if name not in denoisers:
            raise ExportError(f"--distil trains denoisers, not {name}; take it of --components")
    weights: dict[str, dict[str, np.ndarray]] = {}
    before, after = 0.0, 0.0
    for part in merged.parts():  # an expert is in a network that it shares until the next is asked
        if part.name not in plan.components:
            continue
        lesson, trained = _prepare(source, part, plan)
        held = lesson.feeds(HELD_SEED)
        before = max(before, lesson.error(held))
        _train(lesson, trained, steps, progress)
        after = max(after, lesson.error(held))
        weights[part.name] = _values(lesson.student.module, trained)
    return Distilled(weights, steps, before, after)


def _prepare(source: ExportFolder, part: Part, plan: Plan) -> tuple[Lesson, list[str]]:
    model = load_graph(source.root / source.manifest.graphs[part.name].file)
    plan.scheme.prepare(model)
    layers = without(layers_of(model, plan.scheme.kinds), plan.skips.patterns)
    teacher = part.module.eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    trained = []
    for layer in layers:
        if not is_phase(layer.weight):  # sums of weights are rounded there: it stays float here
            trained += _round_layer(student, layer.name, plan.scheme)
    held = {parameter_of(name) for name in model.graph.initializers}
    trained = [name for name in trained if name in held]
    module = _with_module(part, student)
    loader = onnx_loader(source, plan.threads)
    return Lesson(source, part.name, part, module, plan.prompts, loader), trained


def _round_layer(student: nn.Module, weight: str, scheme: Scheme) -> list[str]:
    """Put rounding into one layer; names of the parameters that are trained."""
    place, _, kind = weight.rpartition(".")
    try:
        layer = student.get_submodule(place)
    except AttributeError:
        raise ExportError(
            f"the base has no layer {place}; was the folder exported from it?"
        ) from None
    parametrize.register_parametrization(layer, kind, weight_rounding(scheme))
    rounding = activation_rounding(scheme)
    if rounding is not None:
        layer.register_forward_pre_hook(lambda _, given: (rounding(given[0]), *given[1:]))
    has_bias = getattr(layer, "bias", None) is not None
    return [weight, f"{place}.bias"] if has_bias else [weight]


def _train(
    lesson: Lesson, trained: Sequence[str], steps: int, progress: Callable[[str], None]
) -> None:
    leaves = [_leaf(lesson.student.module, name).requires_grad_(True) for name in trained]
    optimizer = torch.optim.Adam(leaves, lr=RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    chance = np.random.default_rng(0)
    feeds: list[list[Feeds]] = []
    for step in range(steps):
        if step % ROUND == 0:
            progress(f"distilling {lesson.name}: step {step} of {steps}")
            feeds = lesson.feeds(seed=step * len(lesson.prompts))
        level = feeds[int(chance.integers(len(feeds)))]
        chosen = chance.permutation(len(level))[:BATCH]
        loss = lesson.gap([level[index] for index in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()


def _leaf(module: nn.Module, name: str) -> nn.Parameter:
    """The trained value behind a parameter, which may have rounding in front of it."""
    place, _, kind = name.rpartition(".")
    layer = module.get_submodule(place)
    if parametrize.is_parametrized(layer, kind):
        return layer.get_parameter(f"parametrizations.{kind}.original")
    return layer.get_parameter(kind)


def _values(module: nn.Module, names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: _leaf(module, name).detach().float().numpy().copy() for name in names}


def _with_module(part: Part, module: nn.Module) -> Part:
    return Part(
        name=part.name,
        module=module,
        inputs=part.inputs,
        outputs=part.outputs,
        config=part.config,
        sizes=part.sizes,
        multiples=part.multiples,
        vocabulary=part.vocabulary,
    )


def _batch(part: Part, feeds: Sequence[Feeds]) -> list[Tensor]:
    """Calls of one level side by side; what has no batch axis is the same in all of them."""
    found = []
    for port in part.inputs:
        has_batch = bool(port.dims) and port.dims[0] == "batch_size"
        values = [feed[port.name] for feed in feeds]
        found.append(torch.from_numpy(np.concatenate(values) if has_batch else values[0]))
    return found


def _first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer
