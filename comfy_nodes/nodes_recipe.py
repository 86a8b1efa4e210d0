"""Nodes about recipes: choose or write one, read one, put one into a file.

What reads files is imported when a node runs, not when ComfyUI starts.
"""

from pathlib import Path
from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]

from fewstep.comfy_nodes.compat import accepted
from fewstep.comfy_nodes.presets import CUSTOM, Preset, find_preset
from fewstep.comfy_nodes.recipe_attaching import copy_name
from fewstep.comfy_nodes.recipe_building import (
    AS_IT_IS,
    Changes,
    changed_recipe,
    custom_recipe,
)
from fewstep.comfy_nodes.recipe_report import report
from fewstep.comfy_nodes.recipe_text import printable, summary
from fewstep.comfy_nodes.recipe_widgets import recipe_inputs
from fewstep.comfy_nodes.sockets import NamedRecipe, RecipeSocket
from fewstep.errors import AdapterError, FewstepError

CATEGORY = "few-step/recipe"
NONE = "none"
"""The choice of no file."""


class FewStepRecipe(io.ComfyNode):
    """A recipe from the list of presets or from widgets."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return accepted(
            io.Schema,
            node_id="FewStepRecipe",
            display_name="Few-Step Recipe",
            category=CATEGORY,
            description=(
                "How a few-step model is sampled: the published settings of a known LoRA or "
                "checkpoint, or your own. Brings files without a recipe into the Few-Step nodes."
            ),
            search_aliases=["preset", "lightning", "dmd2", "lcm", "hyper-sd", "turbo"],
            inputs=recipe_inputs(),
            outputs=[
                RecipeSocket.Output(display_name="recipe", tooltip="Connect to a Few-Step node.")
            ],
        )

    @classmethod
    def validate_inputs(cls, preset: str = CUSTOM) -> bool | str:
        """Takes choices of older releases too; says what is meant where there is no such one."""
        try:
            _preset_or_none(preset)
        except FewstepError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, preset: str, family: str = "sdxl", prediction: str = AS_IT_IS, **widgets: Any
    ) -> io.NodeOutput:
        changes = Changes(**widgets)
        chosen = _preset_or_none(preset)
        if chosen is None:
            named = NamedRecipe(custom_recipe(family, prediction, changes), "custom recipe")
            notes = []
        else:
            suffix = f" (changed: {', '.join(changes.names)})" if changes.names else ""
            recipe = changed_recipe(chosen.recipe, changes)
            named = NamedRecipe(recipe, f"{chosen.title}{suffix}")
            notes = [chosen.entry.notes, *chosen.entry.sources]
        lines = [summary(named.recipe, named.name), named.name, *notes]
        return io.NodeOutput(named, ui=ui.PreviewText("\n".join(map(printable, lines))))


class FewStepRecipeInfo(io.ComfyNode):
    """A recipe in words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return accepted(
            io.Schema,
            node_id="FewStepRecipeInfo",
            display_name="Few-Step Recipe Info",
            category=CATEGORY,
            description=(
                "Shows how a LoRA, a recipe or a MODEL wants to be sampled: steps, timesteps, "
                "sigmas, sampler, guidance, experts, base, licence, and what may go wrong. Reads "
                "the header of a file only."
            ),
            search_aliases=["inspect", "metadata"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    optional=True,
                    options=[NONE, *folder_paths.get_filename_list("loras")],
                    default=NONE,
                    tooltip='A LoRA to read; "none" shows what is connected.',
                ),
                RecipeSocket.Input(
                    "recipe", optional=True, tooltip="Shown in place of the LoRA's or the MODEL's."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Its recipe is shown if nothing else is given; sigmas are shown in its "
                    "own numbers.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="What the node shows.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = NONE, **_: Any) -> str:
        return _fingerprint(lora_name)

    @classmethod
    def execute(
        cls, lora_name: str = NONE, recipe: NamedRecipe | None = None, model: Any = None
    ) -> io.NodeOutput:
        file = None if lora_name == NONE else _lora_path(lora_name)
        text = report(file, recipe, model)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class FewStepAttachRecipe(io.ComfyNode):
    """A copy of a LoRA with a recipe inside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return accepted(
            io.Schema,
            node_id="FewStepAttachRecipe",
            display_name="Few-Step Attach Recipe",
            category=CATEGORY,
            description=(
                "Saves a copy of a LoRA that carries the recipe, in the loras folder. From then on "
                '"Few-Step LoRA Loader" samples it right by itself. Weights stay as they are, byte '
                "for byte; the original is never changed."
            ),
            search_aliases=["save", "embed", "metadata"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="The LoRA to copy.",
                ),
                RecipeSocket.Input("recipe", tooltip="What the copy will carry."),
                io.String.Input(
                    "file_name",
                    optional=True,
                    default="",
                    placeholder="NAME-few-step.safetensors",
                    tooltip="Name of the copy, without folders. Empty: the LoRA's own name with "
                    '"-few-step" behind it.',
                ),
                io.Boolean.Input(
                    "overwrite",
                    optional=True,
                    default=False,
                    tooltip="Replace another file of this name. Off: that is an error.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="file_name", tooltip="The copy, as loaders list it.")
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str = NONE, file_name: str = "", overwrite: bool = False, **_: Any
    ) -> str:
        return f"{_fingerprint(lora_name)}|{_fingerprint(copy_name(file_name, lora_name))}"

    @classmethod
    def execute(
        cls, lora_name: str, recipe: NamedRecipe, file_name: str = "", overwrite: bool = False
    ) -> io.NodeOutput:
        from fewstep.adapters.recipe_copy import copy_with_recipe

        name = copy_name(file_name, lora_name)
        target = Path(folder_paths.get_folder_paths("loras")[0]) / name
        is_new = copy_with_recipe(_lora_path(lora_name), target, recipe.recipe, overwrite=overwrite)
        how = "saved in the loras folder" if is_new else "is there already, with this recipe"
        text = f"{name}: {how}\n{summary(recipe.recipe, recipe.name)}"
        return io.NodeOutput(name, ui=ui.PreviewText(text))


def _preset_or_none(choice: str) -> Preset | None:
    return None if choice == CUSTOM else find_preset(choice)


def _lora_path(lora_name: str) -> Path:
    path = folder_paths.get_full_path("loras", lora_name)
    if path is None:
        raise AdapterError(
            f"{lora_name!r} is not in the loras folder; choose a file that is there."
        )
    return Path(path)


def _fingerprint(lora_name: str) -> str:
    """Of a file's name, time and size; of the name alone where there is no such file."""
    from fewstep.comfy_nodes.lora_file import fingerprint

    path = None if lora_name == NONE else folder_paths.get_full_path("loras", lora_name)
    return lora_name if path is None else f"{lora_name}:{fingerprint(Path(path))}"
