"""MODELs and phases are matched, or one sentence says what is missing."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep.comfy_nodes.expert_models import phase_models
from fewstep.comfy_nodes.expert_patches import ATTACHMENT, ExpertPatches, ExpertSet
from fewstep.errors import PipelineError
from fewstep.recipe import Expert
from tests.tiny.recipes import flow_recipe

PLAIN = flow_recipe("wan")
NAMES = ("high_noise", "low_noise")


class Model:
    """A MODEL that carries something."""

    def __init__(self, experts: ExpertSet | None = None) -> None:
        self.attachments = {ATTACHMENT: experts}
        self.patches: list[tuple[Any, float]] = []

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)

    def remove_attachments(self, key: str) -> None:
        del self.attachments[key]

    def remove_wrappers_with_key(self, kind: str, key: str) -> None: ...

    def add_patches(self, patches: Any, strength: float) -> None:
        self.patches.append((patches, strength))

    def clone(self) -> "Model":
        other = Model()
        other.attachments, other.patches = dict(self.attachments), list(self.patches)
        return other


def named(*components: str | None) -> Any:
    """A recipe with experts of these components, as it is on a wire."""
    grid = PLAIN.grids[0]
    if not components:
        return SimpleNamespace(recipe=PLAIN, name="few.safetensors")
    experts = (
        Expert(adapter=NAMES[0], sigma_high=1.0, sigma_low=0.7, component=components[0]),
        Expert(adapter=NAMES[1], sigma_high=0.7, sigma_low=0.0, component=components[1]),
    )
    chosen = tuple(0 if sigma >= 0.7 else 1 for sigma in grid.sigmas[:-1])
    grids = (replace(grid, experts=chosen),)
    return SimpleNamespace(
        recipe=replace(PLAIN, experts=experts, grids=grids), name="few.safetensors"
    )


OWN = named("transformer", "transformer_2")
SHARED = named(None, None)


def waiting(*phases: int) -> ExpertSet:
    """Patches that wait for these phases."""
    return ExpertSet(NAMES, {p: ExpertPatches(({f"weight {p}": p},), 0.5) for p in phases})


def test_without_phases_the_model_is_sampled_as_it_is() -> None:
    model = Model()
    assert phase_models(model, (), named()) == (model,)
    with pytest.raises(PipelineError, match="has one phase, but 2 MODELs are connected"):
        phase_models(model, (Model(),), named())


def test_experts_over_one_base_become_clones() -> None:
    model = Model(waiting(0, 1))
    high, low = phase_models(model, (), SHARED)
    assert high.patches == [({"weight 0": 0}, 0.5)]
    assert low.patches == [({"weight 1": 1}, 0.5)]
    assert model.patches == []


def test_an_expert_over_one_base_that_is_missing_is_named() -> None:
    with pytest.raises(PipelineError, match="carries 1 of 2 phase experts. Load low_noise with"):
        phase_models(Model(waiting(0)), (), SHARED)
    with pytest.raises(PipelineError, match="share one MODEL, but 2 are connected"):
        phase_models(Model(waiting(0, 1)), (Model(),), SHARED)


def test_networks_are_put_in_order_by_what_they_carry() -> None:
    high, low = Model(ExpertSet(NAMES, network=0)), Model(ExpertSet(NAMES, network=1))
    assert phase_models(low, (high,), OWN) == (high, low)
    first, second = Model(), Model()  # loaded by other nodes: in the order they are connected
    assert phase_models(first, (second,), OWN) == (first, second)


def test_networks_that_are_missing_or_twice_are_named() -> None:
    low = Model(ExpertSet(NAMES, network=1))
    with pytest.raises(PipelineError, match="Connect the MODEL of high_noise to model_2"):
        phase_models(low, (), OWN)
    with pytest.raises(PipelineError, match="Two of the connected MODELs are phase 'low_noise'"):
        phase_models(low, (Model(ExpertSet(NAMES, network=1)),), OWN)


def test_a_recipe_of_other_experts_is_refused() -> None:
    with pytest.raises(PipelineError, match="but the recipe of 'few.safetensors' has no phases"):
        phase_models(Model(waiting(0, 1)), (), named())
