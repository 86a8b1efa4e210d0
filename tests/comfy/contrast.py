"""What ComfyUI's own nodes draw with the settings people usually pick, against FewStepPipeline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.comfy.graph import Graph, Node
from tests.comfy.harness import Comfy
from tests.comfy.parity import (
    SAMPLERS,
    SEED,
    Drawing,
    base,
    empty_latent,
    prompt,
    recipe_for,
    result,
)
from tests.comfy.references import reference, relative_error
from tests.comfy.tiny_models import SD3, SD15, WAN, TinyModel

Change = Callable[[Graph, Node, Drawing], Node]
"""Puts a node between the loader and the sampler."""


@dataclass(frozen=True, slots=True)
class Habit:
    """One row.

    Attributes:
        model: The tiny model.
        sampler: How the adapter wants to be sampled (`parity.SAMPLERS`).
        title: What people pick.
        widgets: Of KSampler.
        change: What they put before it.
        lora: Whether FewStepPipeline has an adapter on too.
    """

    model: TinyModel
    sampler: str
    title: str
    widgets: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    lora: bool = False


@dataclass(frozen=True, slots=True)
class Contrast:
    """What came of a habit.

    Attributes:
        wanted: Timesteps the network should be told.
        told: Those it was told.
        error: Relative L2 error of the latents.
    """

    wanted: tuple[float, ...]
    told: tuple[float, ...]
    error: float


def _shift(amount: float) -> Change:
    def change(graph: Graph, model: Node, drawing: Drawing) -> Node:
        return graph.add("ModelSamplingSD3", model=model, shift=amount)

    return change


def _lcm(graph: Graph, model: Node, drawing: Drawing) -> Node:
    return graph.add("ModelSamplingDiscrete", model=model, sampling="lcm", zsnr=False)


def _stock_loader(graph: Graph, model: Node, drawing: Drawing) -> Node:
    file = drawing.lora()
    return graph.add("LoraLoaderModelOnly", model=model, lora_name=file.name, strength_model=1.0)


def _ksampler(sampler: str, scheduler: str, cfg: float = 1.0) -> dict[str, Any]:
    return {"sampler_name": sampler, "scheduler": scheduler, "cfg": cfg}


HABITS = (
    Habit(SD15, "deterministic", "euler, simple", _ksampler("euler", "simple")),
    Habit(SD15, "deterministic", "euler, sgm_uniform", _ksampler("euler", "sgm_uniform")),
    Habit(SD15, "deterministic", "euler, normal", _ksampler("euler", "normal")),
    Habit(SD15, "deterministic", "euler, karras", _ksampler("euler", "karras")),
    Habit(SD15, "deterministic", "euler, simple, cfg 7", _ksampler("euler", "simple", 7.0)),
    Habit(SD15, "re-noise", "lcm, simple", _ksampler("lcm", "simple")),
    Habit(
        SD15,
        "re-noise",
        "ModelSamplingDiscrete lcm; lcm, sgm_uniform",
        _ksampler("lcm", "sgm_uniform"),
        _lcm,
    ),
    Habit(
        SD15,
        "deterministic",
        "diffusers LoRA in Load LoRA; euler, simple",
        _ksampler("euler", "simple"),
        _stock_loader,
        lora=True,
    ),
    Habit(SD3, "deterministic", "euler, simple", _ksampler("euler", "simple")),
    Habit(SD3, "deterministic", "euler, normal", _ksampler("euler", "normal")),
    Habit(
        SD3,
        "deterministic",
        "ModelSamplingSD3 5; euler, simple",
        _ksampler("euler", "simple"),
        _shift(5.0),
    ),
    Habit(
        SD3,
        "deterministic",
        "ModelSamplingSD3 5; euler, sgm_uniform",
        _ksampler("euler", "sgm_uniform"),
        _shift(5.0),
    ),
    Habit(
        SD3,
        "re-noise",
        "ModelSamplingSD3 5; lcm, simple",
        _ksampler("lcm", "simple"),
        _shift(5.0),
    ),
    Habit(
        SD3,
        "deterministic",
        "diffusers LoRA in Load LoRA; ModelSamplingSD3 5; euler, simple",
        _ksampler("euler", "simple"),
        lambda graph, model, drawing: _shift(5.0)(
            graph, _stock_loader(graph, model, drawing), drawing
        ),
        lora=True,
    ),
    Habit(WAN, "deterministic", "euler, simple", _ksampler("euler", "simple")),
    Habit(
        WAN,
        "deterministic",
        "ModelSamplingSD3 5; euler, simple",
        _ksampler("euler", "simple"),
        _shift(5.0),
    ),
)


def contrast(comfy: Comfy, habit: Habit) -> Contrast:
    """Draw it both ways."""
    recipe = recipe_for(habit.model, SAMPLERS[habit.sampler])
    drawing = Drawing(comfy, habit.model, recipe, f"{habit.model.name}-contrast")
    graph = Graph()
    model = base(graph, comfy, habit.model)
    if habit.change is not None:
        model = habit.change(graph, model, drawing)
    sampled = graph.add(
        "KSampler",
        model=graph.add("FewStepTestSpy", model=model, name="network"),
        positive=prompt(graph, habit.model),
        negative=prompt(graph, habit.model, seed=12),
        latent_image=empty_latent(graph, habit.model),
        seed=SEED,
        steps=4,
        denoise=1.0,
        **habit.widgets,
    )
    latents = result(graph, comfy, habit.model, sampled)
    told = tuple(float(call["timestep"][0]) for call in comfy.seen())
    adapter = drawing.lora() if habit.lora else None
    expected = reference(habit.model, recipe, seed=SEED, adapter=adapter)
    return Contrast(recipe.grids[0].timesteps, told, relative_error(latents, expected))
