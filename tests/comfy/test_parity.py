"""Same adapter, same seed: FewStepPipeline and ComfyUI draw the same picture."""

import pytest

from tests.comfy.harness import Comfy
from tests.comfy.parity import CASES, PARITY, SAMPLERS, has_reference, parity_error
from tests.comfy.tiny_models import ALL_MODELS, TinyModel

CELLS = [
    pytest.param(model, sampler, case, id=f"{model.name}-{sampler}-{case}".replace(" ", "_"))
    for model in ALL_MODELS
    for sampler in SAMPLERS
    for case in CASES
    if has_reference(model, case)
]


@pytest.mark.parametrize(("model", "sampler", "case"), CELLS)
def test_the_latents_are_fewsteppipelines(
    comfy: Comfy, model: TinyModel, sampler: str, case: str
) -> None:
    assert parity_error(comfy, model, sampler, case) <= PARITY
