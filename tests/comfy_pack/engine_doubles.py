"""An export folder without graphs: sessions that note what they are fed and answer zeros."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.comfy_nodes.engine_runtime import Engine
from fewstep.recipe import FewStepRecipe
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.manifest import Graph, Manifest, StoredFile, Tensor
from tests.tiny.recipes import flow_recipe, vp_recipe

LATENT = ("batch_size", "4", "height", "width")
SETTINGS = {
    "vae_scale_factor": 8,
    "latent_channels": 4,
    "scaling_factor": 2.0,
    "shift_factor": 0.0,
    "sample_size": 64,
}


@dataclass
class NotingSession:
    """Answers the mean of its first input in the shape of its output; keeps what it was fed."""

    graph: Graph
    provider: str = "cpu"
    calls: list[dict[str, np.ndarray]] = field(default_factory=list)

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        self.calls.append(dict(feeds))
        first = feeds[self.graph.inputs[0].name]
        names = outputs or [tensor.name for tensor in self.graph.outputs]
        return {name: self._answer(name, first) for name in names}

    def _answer(self, name: str, first: np.ndarray) -> np.ndarray:
        if self.graph.file.startswith("vae_decoder"):
            return np.repeat(np.repeat(first[:, :3], 8, 2), 8, 3)
        if self.graph.file.startswith("vae_encoder"):
            return np.repeat(first[:, :1, ::8, ::8], 8, axis=1)
        return first.copy()


@dataclass
class NotingLoader:
    """Loads `NotingSession`s."""

    name: str = "cpu"
    sessions: dict[str, NotingSession] = field(default_factory=dict)

    def load(self, graph: Graph) -> NotingSession:
        return self.sessions.setdefault(graph.file, NotingSession(graph))


def graph(name: str, inputs: tuple[Tensor, ...], output: str, **more: Any) -> Graph:
    """A graph with one output shaped like a latent."""
    return Graph(
        file=f"{name}/model.onnx",
        inputs=inputs,
        outputs=(Tensor(name=output, dtype="float32", dims=LATENT),),
        opset=18,
        precision="fp32",
        **more,
    )


def tensor(name: str, *dims: str, dtype: Any = "float32") -> Tensor:
    """An input."""
    return Tensor(name=name, dtype=dtype, dims=dims)


STATES = ("batch_size", "sequence_length", "8")
UNET = graph(
    "unet",
    (
        tensor("sample", *LATENT),
        tensor("timestep"),
        tensor("encoder_hidden_states", *STATES),
        tensor("timestep_cond", "batch_size", "6"),
    ),
    "out_sample",
    multiples={"height": 2, "width": 2},
)
UNET_XL = graph(
    "unet",
    (
        tensor("sample", *LATENT),
        tensor("timestep"),
        tensor("encoder_hidden_states", *STATES),
        tensor("text_embeds", "batch_size", "5"),
        tensor("time_ids", "batch_size", "6"),
    ),
    "out_sample",
)
FLUX = graph(
    "transformer",
    (
        tensor("hidden_states", "batch_size", "packed_height_width", "16"),
        tensor("timestep", "1"),
        tensor("guidance", "batch_size"),
        tensor("pooled_projections", "batch_size", "5"),
        tensor("encoder_hidden_states", *STATES),
        tensor("txt_ids", "sequence_length", "3"),
        tensor("img_ids", "packed_height_width", "3"),
    ),
    "out_hidden_states",
)
PIXART = graph(
    "transformer",
    (
        tensor("hidden_states", *LATENT),
        tensor("encoder_hidden_states", *STATES),
        tensor("encoder_attention_mask", "batch_size", "sequence_length", dtype="int64"),
        tensor("timestep", "1"),
    ),
    "out_hidden_states",
)
DENOISERS = {"sd15": UNET, "sdxl": UNET_XL, "flux": FLUX, "pixart": PIXART}


def manifest_of(family: str) -> Manifest:
    """What `fewstep export` would have written."""
    denoiser = DENOISERS[family]
    return Manifest(
        format="fewstep.export/1",
        family=family,
        pipeline="AnyPipeline",
        precision="fp32",
        graphs={
            denoiser.file.partition("/")[0]: denoiser,
            "vae_decoder": graph("vae_decoder", (tensor("latent_sample", *LATENT),), "sample"),
            "vae_encoder": graph(
                "vae_encoder",
                (tensor("sample", "batch_size", "3", "h", "w"),),
                "latent_parameters",
            ),
        },
        settings=SETTINGS,
        files={
            denoiser.file: StoredFile(bytes=10, sha256="0"),
            f"{denoiser.file}_data": StoredFile(bytes=1000, sha256="0"),
        },
    )


def engine_of(
    family: str, recipe: FewStepRecipe | None = None, *, provider: str = "cpu"
) -> tuple[Engine, NotingLoader]:
    """An engine and the loader that keeps its sessions."""
    made = flow_recipe(family) if family == "flux" else vp_recipe(family)
    loader = NotingLoader(provider)
    folder = ExportFolder(Path("nowhere"), manifest_of(family), recipe or made)
    return Engine("tiny", folder, loader), loader
