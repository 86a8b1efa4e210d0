"""The node that makes a GUIDER of a recipe."""

from typing import Any

from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]

from fewstep.comfy_nodes.compat import accepted
from fewstep.comfy_nodes.expert_guider import make_guider
from fewstep.comfy_nodes.guidance_choice import choose_guidance
from fewstep.comfy_nodes.model_recipe import resolve
from fewstep.comfy_nodes.sockets import NamedRecipe, RecipeSocket


class FewStepGuider(io.ComfyNode):
    """MODEL + prompts -> GUIDER with the recipe's guidance and phase experts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return accepted(
            io.Schema,
            node_id="FewStepGuider",
            display_name="Few-Step Guider",
            category="few-step/sampling",
            description=(
                "A guider with the guidance a few-step model was trained for, and with its phase "
                "experts (high and low noise) where it has several. For SamplerCustomAdvanced."
            ),
            search_aliases=["guider", "cfg", "high noise", "low noise", "wan 2.2", "experts"],
            inputs=[
                io.Model.Input("model", tooltip="MODEL from the Few-Step LoRA Loader."),
                io.Conditioning.Input("positive", tooltip="Prompt."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Negative prompt; needed only where guidance is not 1.",
                ),
                RecipeSocket.Input(
                    "recipe", optional=True, tooltip="In place of the recipe that MODEL carries."
                ),
                io.Float.Input(
                    "guidance",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="-1 takes the recipe's; 1 is off and runs the network once per step.",
                ),
                io.Model.Input(
                    "model_2",
                    optional=True,
                    tooltip="MODEL of the second phase, where it is another network (Wan 2.2).",
                ),
                io.Model.Input(
                    "model_3",
                    optional=True,
                    tooltip="MODEL of the third phase, where it is another network.",
                ),
                accepted(
                    io.Combo.Input,
                    "experts",
                    options=["one loop", "one run per phase"],
                    default="one loop",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How phase experts take turns: inside one loop (masks work, noise goes "
                        "on), or with one run of ComfyUI's sampling per phase."
                    ),
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced, with any SAMPLER.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        guidance: float = -1.0,
        negative: Any = None,
        recipe: NamedRecipe | None = None,
        model_2: Any = None,
        model_3: Any = None,
        experts: Any = "one loop",
    ) -> io.NodeOutput:
        """Make it."""
        named, scale = resolve(model, recipe), None if guidance < 0.0 else guidance
        others = [other for other in (model_2, model_3) if other is not None]
        guider = make_guider(model, positive, negative, named, scale, others, experts=experts)
        choice = choose_guidance(named.recipe, scale, has_negative=negative is not None)
        if not choice.warning:
            return io.NodeOutput(guider)
        return io.NodeOutput(guider, ui=ui.PreviewText(f"Warning: {choice.warning}"))
