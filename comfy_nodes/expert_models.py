"""The MODEL of each phase of a recipe, or a sentence that says which one is missing. No ComfyUI."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewstep.comfy_nodes.expert_patches import ExpertSet, experts_of, phase_model
from fewstep.errors import PipelineError

if TYPE_CHECKING:
    from fewstep.comfy_nodes.sockets import NamedRecipe


def phase_models(model: Any, others: Sequence[Any], named: "NamedRecipe") -> tuple[Any, ...]:
    """MODELs to sample with, noisiest phase first; one where the recipe has no phases.

    Args:
        model: The MODEL connected first.
        others: Those of further phases.
        named: The recipe in force.

    Raises:
        PipelineError: There are too few or too many, or they carry other experts than it has.
    """
    names = tuple(expert.adapter for expert in named.recipe.experts)
    carried = experts_of(model)
    if carried is not None and carried.names != names:
        there = f"has the phases {', '.join(names)}" if names else "has no phases"
        raise PipelineError(
            f"MODEL carries the phase experts {', '.join(carried.names)}, but the recipe of "
            f"{named.name!r} {there}. Disconnect the recipe, or load its own adapters."
        )
    if not names:
        _check_none(others, named)
        return (model,)
    if carried is not None and carried.patches:
        return _of_one_network(model, others, carried, named)
    return _of_own_networks((model, *others), names, named)


def _check_none(others: Sequence[Any], named: "NamedRecipe") -> None:
    if others:
        raise PipelineError(
            f"The recipe of {named.name!r} has one phase, but {len(others) + 1} MODELs are "
            "connected. Disconnect model_2."
        )


def _of_one_network(
    model: Any, others: Sequence[Any], carried: ExpertSet, named: "NamedRecipe"
) -> tuple[Any, ...]:
    if carried.missing:
        raise PipelineError(
            f"MODEL carries {len(carried.patches)} of {len(carried.names)} phase experts. Load "
            f"{', '.join(carried.missing)} with another Few-Step LoRA Loader."
        )
    if others:
        raise PipelineError(
            f"The phases of {named.name!r} share one MODEL, but {len(others) + 1} are connected. "
            "Disconnect model_2."
        )
    return tuple(phase_model(model, carried.patches[index]) for index in range(len(carried.names)))


def _of_own_networks(
    models: Sequence[Any], names: Sequence[str], named: "NamedRecipe"
) -> tuple[Any, ...]:
    if len(models) != len(names):
        said = [carried.network for carried in map(experts_of, models) if carried is not None]
        missing = [name for index, name in enumerate(names) if index not in said]
        absent = missing if said else list(names[len(models) :])
        advice = f'Connect the MODEL of {", ".join(absent)} to model_2 of "Few-Step Guider"'
        if len(models) > len(names):
            advice = "Disconnect the last"
        raise PipelineError(
            f"The recipe of {named.name!r} has {len(names)} phases ({', '.join(names)}), but "
            f"{len(models)} MODEL{'s are' if len(models) > 1 else ' is'} connected. {advice}."
        )
    places: dict[int, Any] = {}
    for place, one in enumerate(models):
        carried = experts_of(one)
        if carried is not None and carried.patches:
            raise PipelineError(
                f"MODEL {place + 1} carries phase experts that share a network; connect it alone."
            )
        index = place if carried is None or carried.network is None else carried.network
        if index in places:
            raise PipelineError(
                f"Two of the connected MODELs are phase {names[index]!r}. Load the adapter of "
                f"{', '.join(n for i, n in enumerate(names) if i not in places)} on one of them."
            )
        places[index] = one
    return tuple(places[index] for index in range(len(names)))
