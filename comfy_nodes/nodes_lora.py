"""The node that loads a few-step adapter with its recipe."""

from pathlib import Path
from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]

from fewstep.comfy_nodes.compat import accepted
from fewstep.comfy_nodes.lora_file import fingerprint
from fewstep.comfy_nodes.lora_loading import load_few_step_lora
from fewstep.comfy_nodes.sockets import RecipeSocket

AUTO = "auto"
EXPERTS = (AUTO, "1", "2", "3", "4")


class FewStepLoraLoader(io.ComfyNode):
    """MODEL + adapter file -> MODEL that knows how to be sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return accepted(
            io.Schema,
            node_id="FewStepLoraLoader",
            display_name="Few-Step LoRA Loader",
            category="few-step",
            description=(
                "Loads a few-step adapter (LCM, DMD2, Lightning, Hyper-SD, a fewstep export ...) "
                "and the recipe it was trained for: steps, sampler and guidance travel on MODEL. "
                "Reads files in diffusers, PEFT, kohya and ComfyUI names, with their alpha, and "
                "refuses one that fits only in part."
            ),
            search_aliases=["lora", "lcm", "dmd2", "lightning", "turbo", "hyper", "distilled"],
            inputs=[
                io.Model.Input("model", tooltip="The base that the adapter was trained on."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="Adapter file in models/loras.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.01,
                    tooltip="1 is what the recipe says; 0 leaves MODEL as it is.",
                ),
                accepted(
                    io.Combo.Input,
                    "expert",
                    options=list(EXPERTS),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Which phase of a recipe with several (high and low noise) this file is "
                        "for: auto asks the file; 1 is the noisiest."
                    ),
                ),
                accepted(
                    io.Combo.Input,
                    "unmatched_keys",
                    options=["error", "warn"],
                    default="error",
                    optional=True,
                    advanced=True,
                    tooltip="What to do where only a part of the adapter fits MODEL.",
                ),
                accepted(
                    io.Combo.Input,
                    "base_check",
                    options=["error", "warn"],
                    default="error",
                    optional=True,
                    advanced=True,
                    tooltip="What to do where MODEL is not what the adapter was trained on.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="MODEL with the adapter and its recipe."
                ),
                RecipeSocket.Output(
                    display_name="recipe",
                    tooltip="The recipe; MODEL carries it too, so this needs no connection.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength: float,
        expert: str = AUTO,
        unmatched_keys: Any = "error",
        base_check: Any = "error",
    ) -> io.NodeOutput:
        """Load it."""
        path = Path(folder_paths.get_full_path_or_raise("loras", lora_name))
        loaded = load_few_step_lora(
            model,
            path,
            strength,
            expert=None if expert == AUTO else int(expert) - 1,
            unmatched_keys=unmatched_keys,
            base_check=base_check,
        )
        return io.NodeOutput(loaded.model, loaded.named, ui=ui.PreviewText(loaded.text))

    @classmethod
    def fingerprint_inputs(cls, lora_name: str = "", **_: Any) -> str:
        """Changes when the file does."""
        path = folder_paths.get_full_path("loras", lora_name)
        return fingerprint(Path(path)) if path else lora_name
