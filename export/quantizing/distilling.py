"""Quantisation-aware distillation: the rounded student learns to answer as the float one does.

Both see the inputs that the rounded student meets on its own way, recorded anew every few steps.
Only weights (and biases) of the layers that will be quantized are trained; they go back into the
graph by parameter name, which is then quantized as any other.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from fewstep.errors import ExportError
from fewstep.export.checking.reference import onnx_loader
from fewstep.export.merging import MergedPipeline
from fewstep.export.part import Part
from fewstep.export.quantizing.fake_rounding import activation_rounding, weight_rounding
from fewstep.export.quantizing.layers import layers_of, load_graph, without
from fewstep.export.quantizing.lesson import BATCH, HELD_SEED, Lesson, lesson_seed
from fewstep.export.quantizing.plan import Distilled, Plan
from fewstep.export.quantizing.schemes import Scheme
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.session import Feeds
from fewstep.runtime.weight_forms import is_phase, parameter_of

ROUND = 25
"""Steps between two recordings."""
RATE = 2e-4
"""Of Adam, falling to nothing in a straight line."""


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
            feeds = lesson.feeds(lesson_seed(step, len(lesson.prompts)))
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
