"""The fused graph beside the components it was made from: the same pixels, or no export."""

import dataclasses
from pathlib import Path

import numpy as np

from fewstep.errors import ExportError
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from fewstep.runtime.manifest import Manifest, Measured

LIMIT = 1.0
"""Of 255: rounding of a value that lies between two."""
BATCHES = (1, 3)


def verify_fused(folder: Path, manifest: Manifest) -> Manifest:
    """Draw the same pictures with both, at more than one batch size.

    Args:
        folder: With its manifest written.
        manifest: Of the folder.

    Returns:
        The manifest with the figures.

    Raises:
        ExportError: A pixel differs by more than rounding.
    """
    components = FewStepRuntime.load(folder, provider="cpu", has_cache=False)
    fused = FusedRuntime.load(folder, provider="cpu", has_cache=False)
    steps = int(manifest.settings["fused_steps"])
    found = []
    for batch in BATCHES:
        prompts = ["a", "b", "c"][:batch]
        pictures = components(prompts, seed=11, steps=steps).pixels
        figure = pixels_apart(f"batch {batch}", pictures, fused(prompts, seed=11).pixels)
        if figure.value > LIMIT:
            raise ExportError(
                f"the fused graph differs from its components by {figure.value:g} of 255 at batch "
                f"{batch}; nothing was published, export without --fused"
            )
        found.append(figure)
    return dataclasses.replace(manifest, measured=(*manifest.measured, *found))


def pixels_apart(where: str, components: np.ndarray, fused: np.ndarray) -> Measured:
    """The largest difference of a pixel.

    Args:
        where: For people.
        components: uint8 (N, H, W, 3), drawn from the components.
        fused: The same pictures by the fused graph.
    """
    error = float(np.abs(components.astype(np.int16) - fused.astype(np.int16)).max())
    return Measured(what="fused", where=where, value=error, unit="of 255", limit=LIMIT)
