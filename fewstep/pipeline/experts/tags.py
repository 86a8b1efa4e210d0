"""Which of a recipe's experts a file is for, from what the file says of itself (`expert_tags`)."""

from collections.abc import Sequence

from fewstep.adapters import AdapterHeader
from fewstep.adapters.expert_tags import PHASE_KEY, expert_by_name
from fewstep.adapters.names import parse_name
from fewstep.errors import AdapterError
from fewstep.recipe import FewStepRecipe


def experts_in(recipe: FewStepRecipe, header: AdapterHeader) -> Sequence[int]:
    """Indices of the experts a file has weights for.

    Its metadata, then the networks its modules are for, then its name and its folder's.

    Raises:
        AdapterError: It names an expert the recipe does not have, or nothing tells.
    """
    names = [expert.adapter for expert in recipe.experts]
    phase = header.metadata.get(PHASE_KEY, "").strip()
    if phase and phase not in names:
        raise AdapterError(
            f"{header.path}: says {PHASE_KEY} is {phase!r}, but this recipe's experts are "
            f"{', '.join(map(repr, names))}"
        )
    if phase:
        return [names.index(phase)]
    networks = _networks(recipe, header)
    if len(networks) > 1:
        return networks
    by_name = expert_by_name(header, names)
    if by_name is None:
        raise AdapterError(
            f"{header.path}: nothing says which expert this is ({', '.join(map(repr, names))}); "
            'pass adapter={"' + names[0] + '": path, ...}'
        )
    return [by_name]


def _networks(recipe: FewStepRecipe, header: AdapterHeader) -> list[int]:
    """Experts with a network of their own that the file's modules name."""
    components = [expert.component for expert in recipe.experts]
    if len(set(components)) < len(components):
        return []
    named = {parse_name(name).component for name in header.tensors}
    return [index for index, component in enumerate(components) if component in named]
