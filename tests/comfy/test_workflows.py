"""The example workflows: as people open them, and as their API twins run on tiny models."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.comfy.build_workflows import EXAMPLES, SUBGRAPHS, TWINS, files
from tests.comfy.front_end import FrontEnd, front_end
from tests.comfy.harness import Comfy
from tests.comfy.node_kinds import ABSENT, Kind, held, kinds_of
from tests.comfy.server import Server
from tests.comfy.sheet import NOTE
from tests.comfy.sheet_api import CHECKPOINT, CHECKPOINT_VAE, DROPPED, PROMPT
from tests.comfy.twin_files import make_twin_files

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
CHROMIUM = os.environ.get("CHROMIUM", "")
BY_HAND = 5e-4
"""At its last sigma, 0.029, a recipe's sample is alpha = 0.9996 times what ComfyUI means."""
TYPED = 1e-4
"""The first of the sigmas in 08 is 2e-5 below the top on purpose; see its note."""
SAMPLERS = ("FewStepKSampler", "KSampler", "SamplerCustomAdvanced")
TWIN_TYPE = {CHECKPOINT: "UNETLoader", PROMPT: "FewStepTestConditioning"}

Links = set[tuple[str, int, str, str]]
"""From node, its output, to node, its input."""


def example(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def twin(name: str) -> dict[str, Any]:
    return json.loads((TWINS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def kinds(comfy: Comfy) -> dict[str, Kind]:
    return kinds_of(comfy.nodes())


def is_ours(node: dict[str, Any]) -> bool:
    return "FewStep" in node["type"]


def expected_twin(workflow: dict[str, Any]) -> tuple[dict[str, str], Links]:
    """Types of the nodes and links that the twin of a workflow must have."""
    nodes: dict[int, Any] = {node["id"]: node for node in workflow["nodes"]}
    types: dict[str, str] = {
        str(key): TWIN_TYPE.get(str(node["type"]), str(node["type"]))
        for key, node in nodes.items()
        if node["type"] not in DROPPED
    }
    types |= {f"{key}v": "VAELoader" for key, node in nodes.items() if node["type"] == CHECKPOINT}
    links: Links = set()
    for _, source, slot, target, input, _ in workflow["links"]:
        if nodes[target]["type"] == PROMPT:
            continue
        name = nodes[target]["inputs"][input]["name"]
        is_vae = nodes[source]["type"] == CHECKPOINT and slot == CHECKPOINT_VAE
        node, output = (f"{source}v", 0) if is_vae else (str(source), slot)
        links.add((node, output, str(target), name))
    return types, links


def links_of_graph(graph: dict[str, Any]) -> Links:
    return {
        (value[0], value[1], key, name)
        for key, node in graph.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }


class Runs:
    """Twins that have run, each once.

    Args:
        comfy: With their files.
    """

    def __init__(self, comfy: Comfy) -> None:
        make_twin_files(comfy.folder)
        self._comfy = comfy
        self._done: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def latents(self, name: str, node_type: str) -> list[torch.Tensor]:
        """What every sampler of a type gave, in the order of the ids."""
        graph = twin(name)
        found = [key for key, node in graph.items() if node["class_type"] == node_type]
        return [self._run(name)[0][key]["samples"] for key in found]

    def written(self, name: str) -> list[Path]:
        """Files that the nodes at the ends wrote."""
        shown = self._run(name)[1]
        entries = [one for said in shown.values() for one in said.get("images", ())]
        output = self._comfy.folder / "output"
        return [output / one["subfolder"] / one["filename"] for one in entries]

    def _run(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        if name not in self._done:
            graph = twin(name)
            for key in [key for key in graph if graph[key]["class_type"] in SAMPLERS]:
                catch = {"value": [key, 0], "name": key}
                graph[f"{key}c"] = {"class_type": "FewStepTestCapture", "inputs": catch}
            self._done[name] = (self._comfy.run(graph), dict(self._comfy.ui))
        return self._done[name]


@pytest.fixture(scope="module")
def runs(comfy: Comfy) -> Runs:
    return Runs(comfy)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_there_are_nine() -> None:
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(1, 10)]
    assert sorted(path.stem for path in TWINS.glob("*.json")) == NAMES


def test_our_nodes_are_written_as_they_are_now(kinds: dict[str, Kind]) -> None:
    """Else run `python -m tests.comfy.build_workflows`."""
    for path, text in files(kinds).items():
        if path.parent == EXAMPLES:
            now = [node for node in json.loads(text)["nodes"] if is_ours(node)]
            assert [node for node in example(path.stem)["nodes"] if is_ours(node)] == now


@pytest.mark.parametrize("name", NAMES)
def test_every_node_is_one_comfyui_has(name: str, kinds: dict[str, Kind]) -> None:
    for node in example(name)["nodes"]:
        if node["type"] == NOTE:
            continue
        kind = kinds[node["type"]]
        added = [socket for socket, value in held(kind, node["widgets_values"]) if value is ABSENT]
        assert all(socket.is_optional for socket in added), node["type"]  # by a newer ComfyUI
        given = {socket["name"]: socket for socket in node["inputs"]}
        for socket in kind.edge:
            is_linked = given[socket.name]["link"] is not None
            assert is_linked or socket.is_optional, f"{node['type']}.{socket.name}"


@pytest.mark.parametrize("name", NAMES)
def test_links_join_sockets_of_one_type(name: str, kinds: dict[str, Kind]) -> None:
    workflow = example(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len({link[0] for link in workflow["links"]}) == len(workflow["links"])
    for number, source, slot, target, input, type in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][input]["link"] == number
        assert kinds[nodes[source]["type"]].outputs[slot].type == type
        assert kinds[nodes[target]["type"]].edge[input].type in (type, "*")


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_has_the_same_nodes_and_links(name: str) -> None:
    types, links = expected_twin(example(name))
    graph = twin(name)
    assert {key: node["class_type"] for key, node in graph.items()} == types
    assert links_of_graph(graph) == links


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_runs(name: str, runs: Runs) -> None:
    ends = [node for node in twin(name).values() if node["class_type"].startswith("Save")]
    written = runs.written(name)
    assert len(written) == len(ends) > 0
    assert all(file.is_file() for file in written)


def test_sockets_by_hand_give_what_the_recipe_gives(runs: Runs) -> None:
    recipe, by_hand = runs.latents("02_advanced_sockets", "SamplerCustomAdvanced")
    assert difference(by_hand, recipe) < BY_HAND


def test_stock_nodes_give_what_the_preset_gives(runs: Runs) -> None:
    (ours,) = runs.latents("07_existing_lora_with_preset", "FewStepKSampler")
    (stock,) = runs.latents("08_stock_nodes_only", "SamplerCustomAdvanced")
    assert difference(stock, ours) < TYPED


def test_style_masks_and_wrong_settings_change_the_picture(runs: Runs) -> None:
    styled, plain = runs.latents("03_style_lora_plus_few_step", "FewStepKSampler")
    assert difference(styled, plain) > 0.01
    changed, painted = runs.latents("04_img2img_and_inpaint", "FewStepKSampler")
    assert difference(changed, painted) > 0.01
    (right,) = runs.latents("09_right_and_wrong", "FewStepKSampler")
    for wrong in runs.latents("09_right_and_wrong", "KSampler"):
        assert difference(wrong, right) > 0.1


def test_the_blueprint_is_one_node_of_nodes_that_exist(kinds: dict[str, Kind]) -> None:
    """And its links agree with its sockets, inside and on the edge."""
    blueprint = json.loads((SUBGRAPHS / "few_step_t2i.json").read_text(encoding="utf-8"))
    (node,), (inside,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == inside["id"]
    assert [one["name"] for one in node["inputs"]] == [one["name"] for one in inside["inputs"]]
    nodes = {one["id"]: one for one in inside["nodes"]}
    assert {one["type"] for one in nodes.values()} <= set(kinds)
    for link in inside["links"]:
        if link["target_id"] in nodes:
            socket = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert (socket["link"], socket["type"]) == (link["id"], link["type"])
        if link["origin_id"] in nodes:
            assert link["id"] in nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["links"]
    for one in (*inside["inputs"], *inside["outputs"]):
        assert all(number in {link["id"] for link in inside["links"]} for number in one["linkIds"])


@pytest.fixture(scope="module")
def opened(server: Server) -> Iterator[FrontEnd]:
    pytest.importorskip("playwright")
    with front_end(server.url, CHROMIUM) as page:
        yield page


@pytest.mark.skipif(not CHROMIUM, reason="set CHROMIUM to a browser to open the real front end")
class TestFrontEnd:
    """The workflows in the front end that users have."""

    @pytest.mark.parametrize("name", NAMES)
    def test_it_opens_whole(self, name: str, opened: FrontEnd) -> None:
        workflow = example(name)
        assert opened.load(workflow, name) == []
        for node in opened.nodes():
            assert node["known"], node["type"]
            assert node["size"][0] >= node["least"][0], node["type"]
            assert node["size"][1] >= node["least"][1], node["type"]

    @pytest.mark.parametrize("name", NAMES)
    def test_run_would_send_every_node_link_and_value(
        self, name: str, opened: FrontEnd, kinds: dict[str, Kind]
    ) -> None:
        workflow = example(name)
        opened.load(workflow, name)
        sent = opened.graph()
        nodes = {str(node["id"]): node for node in workflow["nodes"] if node["type"] != NOTE}
        assert {key: node["class_type"] for key, node in sent.items()} == {
            key: node["type"] for key, node in nodes.items()
        }
        assert links_of_graph(sent) == {
            (str(source), slot, str(target), nodes[str(target)]["inputs"][input]["name"])
            for _, source, slot, target, input, _ in workflow["links"]
        }
        for key, node in nodes.items():
            for socket, value in held(kinds[node["type"]], node["widgets_values"]):
                wanted = socket.default if value is ABSENT else value
                assert sent[key]["inputs"][socket.name] == wanted

    @pytest.mark.parametrize("name", NAMES)
    def test_saving_keeps_our_nodes(self, name: str, opened: FrontEnd) -> None:
        workflow = example(name)
        opened.load(workflow, name)
        saved = {node["id"]: node for node in opened.saved()["nodes"]}
        for node in filter(is_ours, workflow["nodes"]):
            assert saved[node["id"]]["widgets_values"] == node["widgets_values"]
            assert saved[node["id"]]["size"] == node["size"]

    def test_it_shows_what_nodes_say(self, opened: FrontEnd, server: Server, comfy: Comfy) -> None:
        assert comfy  # whose classes make the tiny models
        make_twin_files(server.folder)
        name = "05_two_phase_experts"
        opened.load(example(name), name)
        server.wait(opened.run(twin(name)))
        opened.page.wait_for_timeout(1000)
        shown = opened.page.evaluate(
            "app.graph._nodes.map((n) => n.widgets?.find((w) => w.name === 'few_step_text')?.box"
            "?.textContent ?? '').join('\\n')"
        )
        assert "All 2 phases: high_noise, low_noise." in shown
        assert "expert    low_noise: step 3, 4" in shown

    def test_templates_blueprint_help_and_languages_are_served(self, server: Server) -> None:
        assert sorted(server.get("/api/workflow_templates")["fewstep-nodes"]) == NAMES
        blueprints = server.get("/api/global_subgraphs").values()
        assert "few_step_t2i" in {one["name"] for one in blueprints}
        assert set(server.get("/api/i18n")) >= {"en", "ja", "zh"}


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap_and_lie_in_their_groups(name: str) -> None:
    workflow = example(name)
    boxes = [
        (node["pos"][0], node["pos"][1] - 30, node["size"][0], node["size"][1] + 30)
        for node in workflow["nodes"]
    ]
    frames = [group["bounding"] for group in workflow["groups"]]
    for kind in (boxes, frames):
        for index, one in enumerate(kind):
            assert not any(_overlap(one, other) for other in kind[:index])
    for box in boxes:
        assert sum(_inside(box, frame) for frame in frames) == 1


def _overlap(one: Any, other: Any) -> bool:
    return all(
        one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2]
        for axis in (0, 1)
    )


def _inside(box: Any, frame: Any) -> bool:
    return all(
        frame[axis] <= box[axis] and box[axis] + box[axis + 2] <= frame[axis] + frame[axis + 2]
        for axis in (0, 1)
    )
