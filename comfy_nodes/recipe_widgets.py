"""Widgets of the node that chooses or writes a recipe.

What each changes is told by `recipe_building.Changes`. All but the first are optional, so that a
widget of a later release never breaks an older workflow.
"""

from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from fewstep.comfy_nodes.compat import accepted
from fewstep.comfy_nodes.presets import CHOICES, CUSTOM
from fewstep.comfy_nodes.recipe_building import AS_IT_IS, PREDICTIONS
from fewstep.comfy_nodes.recipe_limits import FAMILIES


def recipe_inputs() -> list[Any]:
    """In the order of the node; the last ones are for those who know why."""
    return [*_choice_inputs(), *_step_inputs(), *_sampling_inputs()]


def _choice_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "preset",
            options=CHOICES,
            default=CUSTOM,
            tooltip="A published few-step model with its authors' settings, for exactly that file. "
            f'"{CUSTOM}": written below.',
        ),
        io.Combo.Input(
            "family",
            optional=True,
            options=list(FAMILIES),
            default="sdxl",
            tooltip=f'Only for "{CUSTOM}": the base model the LoRA was trained on.',
        ),
        io.Combo.Input(
            "prediction",
            optional=True,
            options=[AS_IT_IS, *PREDICTIONS],
            default=AS_IT_IS,
            tooltip=f'Only for "{CUSTOM}": what the network predicts; "{AS_IT_IS}" is what models '
            "of the family usually do.",
        ),
    ]


def _step_inputs() -> list[Any]:
    return [
        io.Int.Input(
            "steps",
            optional=True,
            default=0,
            min=0,
            max=1000,
            tooltip="Step count. 0: the preset's, or as many as are written below.",
        ),
        io.String.Input(
            "timesteps",
            optional=True,
            default="",
            placeholder="999, 749, 499, 249",
            tooltip="The timesteps the network was trained at, falling, already shifted. Empty: "
            "the preset's.",
        ),
        io.String.Input(
            "sigmas",
            optional=True,
            default="",
            placeholder="14.61, 4.08, 1.61, 0.69, 0",
            tooltip="The same as ComfyUI's sigmas, the last being where the list ends. Empty: the "
            "preset's. Write timesteps or sigmas, not both.",
        ),
    ]


def _sampling_inputs() -> list[Any]:
    return [
        accepted(
            io.Float.Input,
            "shift",
            optional=True,
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            advanced=True,
            tooltip="Flow models: equal steps with this shift, in place of the trained ones. 0: "
            "steps as they are.",
        ),
        accepted(
            io.Float.Input,
            "stochasticity",
            optional=True,
            default=-1.0,
            min=-1.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="0: Euler or DDIM. 1: fresh noise at every step (LCM, DMD2). Between: TCD's "
            "gamma. -1: the preset's, 0 where there is none.",
        ),
        accepted(
            io.Float.Input,
            "guidance",
            optional=True,
            default=-1.0,
            min=-1.0,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="Guidance scale, 1 is off. -1: the preset's, off where there is none.",
        ),
        accepted(
            io.Combo.Input,
            "first_noise",
            optional=True,
            options=[AS_IT_IS, "scaled", "unit"],
            default=AS_IT_IS,
            advanced=True,
            tooltip="What the network sees first: noise times the first sigma (scaled), or noise "
            f'of deviation 1 whatever that sigma is (unit). "{AS_IT_IS}": the preset\'s.',
        ),
    ]
