"""Phase experts on one MODEL: their weights wait in an attachment and are applied when sampling.

They are kept as patches and not as patched MODELs, so that a style LoRA loaded before or after
reaches every phase. Until our guider takes them, a guard refuses to sample without them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewstep.errors import PipelineError

ATTACHMENT = "fewstep_experts"
GUARD = "fewstep_experts"
OUTER_SAMPLE = "outer_sample"
"""ComfyUI's name for wrappers around a whole run (`comfy.patcher_extension.WrappersMP`)."""
PatchGroups = tuple[Mapping[Any, Any], ...]
"""What `ModelPatcher.add_patches` takes; groups, as one target may be patched twice."""


@dataclass(frozen=True, slots=True)
class ExpertPatches:
    """One expert's weights.

    Attributes:
        groups: Patches.
        strength: What they are multiplied with.
    """

    groups: PatchGroups
    strength: float


@dataclass(frozen=True, slots=True)
class ExpertSet:
    """What a MODEL knows of a recipe's phases.

    Attributes:
        names: Of the recipe's experts, noisiest first.
        patches: Index -> weights that wait to be applied in that phase.
        network: Index of the expert that this MODEL's own network is, where each phase has a
            network of its own; its weights are applied already. None where phases share one.
    """

    names: tuple[str, ...]
    patches: Mapping[int, ExpertPatches] = field(default_factory=dict)
    network: int | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the experts that wait for no phase, where phases share a network."""
        return tuple(name for index, name in enumerate(self.names) if index not in self.patches)


def experts_of(model: Any) -> ExpertSet | None:
    """What a MODEL carries; None without experts."""
    return model.get_attachment(ATTACHMENT)


def attach_experts(model: Any, experts: ExpertSet) -> None:
    """Put experts on a MODEL (a clone the caller made), in place of those it has."""
    model.set_attachments(ATTACHMENT, experts)
    model.remove_wrappers_with_key(OUTER_SAMPLE, GUARD)
    if experts.patches:
        model.add_wrapper_with_key(OUTER_SAMPLE, GUARD, _guard_of(len(experts.patches)))


def apply_patches(model: Any, groups: Sequence[Mapping[Any, Any]], strength: float) -> None:
    """Add weights to a MODEL (a clone the caller made)."""
    for patches in groups:
        model.add_patches(patches, strength)


def phase_model(model: Any, patches: ExpertPatches) -> Any:
    """A MODEL for one phase: everything on it, one expert's weights, and no guard."""
    phase = model.clone()
    phase.remove_wrappers_with_key(OUTER_SAMPLE, GUARD)
    phase.remove_attachments(ATTACHMENT)
    apply_patches(phase, patches.groups, patches.strength)
    return phase


def _guard_of(count: int) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise PipelineError(
            f"MODEL carries {count} phase expert{'s' if count > 1 else ''}. Sample it with "
            '"Few-Step Guider" or "Few-Step KSampler"; a plain KSampler would ignore them.'
        )

    return refuse
