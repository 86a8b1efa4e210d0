"""The digits exports pass TensorRT's static rules, at their sizes."""

import pytest

from fewstep.export.tensorrt.command import TensorRtOptions, make_plans
from tests.digits_exports import Teacher, exported


@pytest.mark.slow  # exports take a while
@pytest.mark.parametrize("teacher", ["sd3", "sd15"])
def test_every_component_is_legal(teacher: Teacher) -> None:
    folder = exported(teacher).folder
    plans = make_plans(TensorRtOptions(folder=folder, target="sm90"))
    components = [plan for plan in plans if plan.component != "fused"]
    assert {plan.component for plan in components} >= {"text_encoder", "vae_decoder"}
    assert {f.message for plan in components for f in plan.report.findings} == set()
    assert all(plan.memory.unknown == 0 for plan in components)
    assert len({plan.identity.key for plan in plans}) == len(plans)
