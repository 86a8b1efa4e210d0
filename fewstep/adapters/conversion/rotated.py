"""Rotated weights (LoRaD) as whole deltas of a base, to be made LoRA by `ranking.to_rank`."""

from collections.abc import Callable
from dataclasses import replace

from fewstep.adapters.conversion.checkpoints import Weights
from fewstep.adapters.conversion.converted import ConvertedAdapter
from fewstep.adapters.conversion.tensor_reading import open_tensors
from fewstep.adapters.coverage import Coverage
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.kinds import NEEDS_KEY, adapter_parts, check_rotations
from fewstep.recipe import METADATA_KEY

Progress = Callable[[int, int], None]


def rotated_deltas(
    header: AdapterHeader,
    base: Weights,
    *,
    component: str,
    family: str | None,
    progress: Progress | None = None,
) -> ConvertedAdapter:
    """What the rotations of a file add to each weight of a base, float32.

    Args:
        header: A file of kind "lorad".
        base: Weights of the denoiser it is for, diffusers names.
        component: Where the adapter will go.
        family: Base family.
        progress: Called with (layers done, layers in all).

    Returns:
        Whole deltas in `extras`; the recipe of the file says `lora.kind` "lora".

    Raises:
        AdapterError: A rotation does not fit the base.
    """
    from fewstep.heads import lorad

    rotations = adapter_parts(header).rotations
    check_rotations(header, rotations, base.shapes)
    read = open_tensors(header)
    extras = {}
    for done, rotation in enumerate(rotations):
        if progress:
            progress(done, len(rotations))
        weight = base.read(f"{rotation.name.module}.weight").float()
        turned = lorad.merged(weight, read(rotation.a_name), read(rotation.b_name))
        extras[f"{rotation.name.module}.weight"] = turned - weight
    coverage = Coverage(matched=len(extras), modules=len(extras), ranks={}, alphas={})
    return ConvertedAdapter(
        _as_lora(header), component, {}, {}, {}, {}, {}, extras, coverage, family=family
    )


def _as_lora(header: AdapterHeader) -> AdapterHeader:
    """The header of the file that will be a plain LoRA."""
    metadata = {key: text for key, text in header.metadata.items() if key != NEEDS_KEY}
    recipe = header.recipe()
    if recipe is not None:
        plain = replace(recipe, lora=replace(recipe.lora, kind="lora"))
        metadata[METADATA_KEY] = plain.to_json()
    return replace(header, metadata=metadata)
