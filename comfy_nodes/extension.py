"""All nodes, as ComfyUI asks for them."""

from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]

from fewstep.comfy_nodes.nodes_engine import FewStepEngineLoader
from fewstep.comfy_nodes.nodes_guider import FewStepGuider
from fewstep.comfy_nodes.nodes_ksampler import FewStepKSampler
from fewstep.comfy_nodes.nodes_lora import FewStepLoraLoader
from fewstep.comfy_nodes.nodes_recipe import FewStepAttachRecipe, FewStepRecipe, FewStepRecipeInfo
from fewstep.comfy_nodes.nodes_sampling import FewStepSampling, FewStepSigmas, SamplerFewStep

NODES: tuple[type[io.ComfyNode], ...] = (
    FewStepLoraLoader,
    FewStepKSampler,
    FewStepSampling,
    FewStepGuider,
    FewStepSigmas,
    SamplerFewStep,
    FewStepRecipe,
    FewStepRecipeInfo,
    FewStepAttachRecipe,
    FewStepEngineLoader,
)
"""In the order of the menu."""


class FewStepExtension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Called once, when ComfyUI starts."""
        return list(NODES)
