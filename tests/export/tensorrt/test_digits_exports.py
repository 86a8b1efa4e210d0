"""The digits exports pass TensorRT's static rules, and engines of them take what is fed."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from fewstep.export.tensorrt.command import TensorRtOptions, make_plans
from fewstep.export.tensorrt.graph import read_graph
from fewstep.export.tensorrt.plan import EnginePlan
from fewstep.export.tensorrt.refittable import refittable_weights
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import NAME, fused_feeds
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import Graph
from fewstep.runtime.onnx_session import OnnxLoader
from fewstep.runtime.session import Session
from fewstep.runtime.weight_forms import parameter_of
from tests.digits_exports import DENOISER, PROMPTS, Teacher, exported

TEACHERS = ["sd3", pytest.param("sd15", marks=pytest.mark.slow)]  # an export of its own


def plans_of(teacher: Teacher) -> dict[str, EnginePlan]:
    """What would be built, with nothing said but the GPU."""
    folder = exported(teacher).folder
    plans = make_plans(TensorRtOptions(folder=folder, target="sm90"))
    return {plan.component: plan for plan in plans}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_component_is_legal(teacher: Teacher) -> None:
    plans = plans_of(teacher)
    assert plans.keys() >= {"text_encoder", DENOISER[teacher], "vae_decoder", "vae_encoder", NAME}
    for component, plan in plans.items():
        assert plan.report.is_legal, component
        assert [finding.message for finding in plan.report.findings] == [], component
        assert plan.memory.unknown == 0, component
    assert len({plan.identity.key for plan in plans.values()}) == len(plans)


class Watched:
    """A session, with the shapes it was fed."""

    def __init__(self, session: Session, plan: EnginePlan) -> None:
        self.graph, self.provider = session.graph, session.provider
        self._session, self._plan = session, plan

    def run(
        self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """See that the profile holds the shapes."""
        shapes = {name: value.shape for name, value in feeds.items()}
        (profile,) = self._plan.identity.profiles
        outside = [entry for entry in profile.ranges if not entry.holds(shapes[entry.name])]
        assert not outside, f"{self._plan.component} was fed {shapes}, beyond {outside}"
        return self._session.run(feeds, outputs)


class WatchedLoader:
    """ONNX Runtime, with every session watched."""

    name = "cpu"

    def __init__(self, folder: ExportFolder, plans: Mapping[str, EnginePlan]) -> None:
        self._loader = OnnxLoader(folder.root, {}, threads=1, has_cache=False)
        self._plans = plans

    def load(self, graph: Graph) -> Watched:
        """Load one graph."""
        plan = next(plan for plan in self._plans.values() if plan.graph == graph)
        return Watched(self._loader.load(graph), plan)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_ranges_hold_what_the_runtime_feeds(teacher: Teacher) -> None:
    folder, plans = ExportFolder.open(exported(teacher).folder), plans_of(teacher)
    loader = WatchedLoader(folder, plans)
    runtime = FewStepRuntime(folder, loader, host_of(folder.manifest.family))
    for prompts in (PROMPTS[:1], PROMPTS):
        runtime(prompts, seed=1)
    graph = folder.manifest.graphs[NAME]
    loader.load(graph).run(fused_feeds(folder, graph, PROMPTS, [1, 2, 3]))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_weights_of_an_adapter_are_found_in_the_graph(teacher: Teacher) -> None:
    made, component = exported(teacher), DENOISER[teacher]
    read = read_graph(made.folder / component / "model.onnx")
    found = refittable_weights(read, component, made.adapter)
    stored = {weight.name for weight in read.graph.initializer}
    assert set(found) <= stored
    ends = ("to_q.weight", "to_v.weight")
    wanted = {name for name in stored if parameter_of(name).endswith(ends)}
    assert set(found) == wanted != set()
    assert refittable_weights(read, "vae_decoder", made.adapter) == ()
