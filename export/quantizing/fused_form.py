"""The fused graph of a quantized folder: made from its own components, with their pixels."""

from pathlib import Path

from fewstep.errors import ExportError
from fewstep.export.fused.fusing import add_fused
from fewstep.export.fused.verifying import verify_fused
from fewstep.export.onnx_folder import write_manifest
from fewstep.runtime.export_folder import ExportFolder

FUSABLE = ("int8-dynamic", "int8-static")
"""Precisions whose fused graph gives the components' pixels.

In others ONNX Runtime, which merges nodes where it knows their sizes, changes last bits that
roundings inside a kernel then enlarge: up to 6 of 255 were seen.
"""


def check_fusable(precision: str, activations: str) -> None:
    """Refuse what no fused graph is made of, before the long work begins.

    Raises:
        ExportError: With what to use in its place.
    """
    if precision in FUSABLE and activations != "uint16":
        return
    asked = f"{precision} with {activations}" if precision in FUSABLE else precision
    raise ExportError(
        f"--fused got {asked}, whose pixels change when ONNX Runtime optimises the whole pipeline "
        f"at once; leave it out, or use {' or '.join(FUSABLE)} with activations of 8 bits"
    )


def write_fused(source: ExportFolder, folder: Path) -> None:
    """Add the fused graph, of as many steps as the float one where there is one.

    Args:
        source: The float folder.
        folder: The quantized one, with its manifest; the new manifest has the figures.

    Raises:
        ExportError: The recipe guides, or the graph does not give the components' pixels.
    """
    made = ExportFolder.open(folder)
    steps = source.manifest.settings.get("fused_steps")
    manifest = add_fused(folder, made.manifest, made.recipe, None if steps is None else int(steps))
    write_manifest(folder, verify_fused(folder, write_manifest(folder, manifest)))
