"""Which weights of an exported graph an adapter changes, so that only these stay replaceable."""

from pathlib import Path

from fewstep.adapters.header import read_header
from fewstep.adapters.modules import lora_modules
from fewstep.adapters.names import DENOISER, shown
from fewstep.errors import ExportError
from fewstep.export.tensorrt.graph import ReadGraph
from fewstep.runtime.tensorrt.weight_names import held_names

DENOISERS = ("unet", "transformer", "transformer_2")


def refittable_weights(read: ReadGraph, component: str, adapter: Path) -> tuple[str, ...]:
    """Names of a component's weights that a LoRA changes, sorted.

    Args:
        read: The component's graph.
        component: Of the manifest.
        adapter: A LoRA in diffusers names.

    Returns:
        Empty where the adapter changes other components only.

    Raises:
        AdapterError: The file is damaged.
        ExportError: It changes a layer that the graph does not have.
    """
    stored = {weight.name for weight in read.graph.initializer}
    found = []
    for module in lora_modules(read_header(adapter)):
        name = module.name
        is_unsaid = name.component == DENOISER
        if component not in DENOISERS if is_unsaid else component != name.component:
            continue
        weight = f"{name.module}.weight"
        here = held_names(weight, stored)
        if not here:
            raise ExportError(
                f"{adapter} changes {shown(weight)}, which {read.path} does not have; convert it "
                "first: fewstep convert IN OUT --format diffusers --base BASE"
            )
        found += here
    return tuple(sorted(found))
