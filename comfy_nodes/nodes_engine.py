"""Few-Step Engine Loader: an export folder as MODEL, CLIP and VAE."""

import os
from pathlib import Path
from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]

from fewstep.comfy_nodes.compat import accepted
from fewstep.comfy_nodes.engine_folders import KIND, exports_under, state_of
from fewstep.comfy_nodes.engine_packages import PROVIDERS, require
from fewstep.comfy_nodes.model_recipe import attach
from fewstep.comfy_nodes.sockets import NamedRecipe, RecipeSocket
from fewstep.errors import ExportFolderError

folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))


class FewStepEngineLoader(io.ComfyNode):
    """Runs what `fewstep export onnx` made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Named after the folder and the provider."""
        return accepted(
            io.Schema,
            node_id="FewStepEngineLoader",
            display_name="Few-Step Engine Loader",
            category="few-step",
            description=(
                "Runs a folder made by `fewstep export onnx` with ONNX Runtime, OpenVINO or "
                "TensorRT: MODEL, CLIP and VAE for every stock node, and the recipe it was "
                "exported with. SD 1.x/2.x, SDXL, SD3, FLUX.1 and PixArt. Put the folder into "
                "models/fewstep. Weights are fixed: LoRAs and ControlNets are refused. Needs "
                "onnxruntime in ComfyUI's Python."
            ),
            search_aliases=["onnx", "tensorrt", "openvino", "few-step", "export"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list(_exports()),
                    tooltip="An export folder (it holds manifest.json) in models/fewstep.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    default="auto",
                    tooltip=(
                        "What runs it. auto measures those that are installed, once per model and "
                        "machine; tensorrt-native needs engines built by `fewstep export "
                        "tensorrt`. openvino-bf16 is quicker on processors with AMX, and draws "
                        "nearly the same picture."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The network, with its recipe attached."),
                io.Clip.Output(
                    tooltip="The text encoders. One text for all of them; no (word:1.2) weights."
                ),
                io.Vae.Output(tooltip="The autoencoder. Encoding takes the mean."),
                RecipeSocket.Output(
                    display_name="recipe", tooltip="How it is sampled: steps, sigmas, guidance."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = "", provider: str = "") -> str:
        """Runs again when the export was made again."""
        root = _exports().get(folder)
        return f"{folder}:{provider}:{state_of(root) if root else 'missing'}"

    @classmethod
    def execute(cls, folder: str, provider: str) -> io.NodeOutput:
        """Open the folder; graphs are loaded when they are first used."""
        require(provider)
        from fewstep.comfy_nodes.engine_clip import EngineClip
        from fewstep.comfy_nodes.engine_families import in_comfyui
        from fewstep.comfy_nodes.engine_model import make_model
        from fewstep.comfy_nodes.engine_runtime import open_engine
        from fewstep.comfy_nodes.engine_vae import EngineVae
        from fewstep.comfy_nodes.lora_loading import set_shift

        root = _exports().get(folder)
        if root is None:
            raise ExportFolderError(
                f"'{folder}' is no longer in models/{KIND}; put the export folder back and reload."
            )
        engine = open_engine(folder, root, provider)
        named = NamedRecipe(in_comfyui(engine.folder.recipe), folder)
        model = make_model(engine)
        set_shift(model, named.recipe)
        attach(model, named)
        return io.NodeOutput(
            model, EngineClip(engine), EngineVae(engine), named, ui=_summary(engine)
        )


def _summary(engine: Any) -> Any:
    """One line for people: what it is, how it is sampled, what runs it."""
    recipe, size = engine.folder.recipe, engine.host.default_size
    verified = "" if engine.folder.manifest.verified else " · not verified"
    return ui.PreviewText(
        f"{engine.family.title} · {recipe.default_steps} steps · {engine.provider} · trained at "
        f"{size.width}x{size.height}, sides in multiples of {engine.host.size_multiple}{verified}"
    )


def _exports() -> dict[str, Path]:
    return exports_under(Path(root) for root in folder_paths.get_folder_paths(KIND))
