"""What stock pipelines read from a scheduler's config, said for a recipe."""

from typing import Any

from fewstep.recipe import FewStepRecipe
from fewstep.sampling import Prediction

DIFFUSERS_PREDICTIONS: dict[Prediction, str] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "x0": "sample",
    "flow": "flow_prediction",
    "trigflow": "trigflow",
}


def read_by_pipelines(recipe: FewStepRecipe) -> dict[str, Any]:
    """Config entries that stock pipelines look at to compute mu, or to scale their samples."""
    read: dict[str, Any] = {}
    if recipe.base.schedule.sigma_data is not None:
        read["sigma_data"] = recipe.base.schedule.sigma_data
    shift = recipe.resolution_shift
    if shift is not None:
        read["use_dynamic_shifting"] = True
        if shift.rule == "interpolated":
            read |= {
                "base_shift": shift.base_shift,
                "max_shift": shift.max_shift,
                "base_image_seq_len": shift.base_tokens,
                "max_image_seq_len": shift.max_tokens,
            }
    return read
