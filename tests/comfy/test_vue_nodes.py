"""Our nodes as the front end draws them in HTML: "Nodes 2.0", which users can switch on."""

import os
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from tests.comfy.front_end import VUE_NODES, FrontEnd, front_end
from tests.comfy.harness import Comfy
from tests.comfy.server import Server
from tests.comfy.test_workflows import NAMES, example, is_ours, twin
from tests.comfy.twin_files import make_twin_files

CHROMIUM = os.environ.get("CHROMIUM", "")
TOOLTIP_MS = 5_000

pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="set CHROMIUM to a browser to open the real front end"
)


@pytest.fixture(scope="module")
def opened(server: Server, comfy: Comfy) -> Iterator[FrontEnd]:
    """With the files of the twins; classes of `comfy` make the tiny models in them."""
    assert comfy
    pytest.importorskip("playwright")
    make_twin_files(server.folder)
    with front_end(server.url, CHROMIUM, settings=VUE_NODES) as page:
        yield page


def ids_of(name: str, *types: str) -> list[int]:
    """Of our nodes in a workflow; of some types, where they are named."""
    ours = filter(is_ours, example(name)["nodes"])
    return [node["id"] for node in ours if not types or node["type"] in types]


def node_of(page: FrontEnd, name: str, type: str) -> Any:
    """The element of the one node of a type."""
    (found,) = ids_of(name, type)
    return page.page.locator(f'[data-node-id="{found}"]')


def meet(one: dict[str, float], other: dict[str, float]) -> bool:
    return (one["left"] < other["right"] and other["left"] < one["right"]) and (
        one["top"] < other["bottom"] and other["top"] < one["bottom"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_our_nodes_are_drawn_and_do_not_overlap(name: str, opened: FrontEnd) -> None:
    assert opened.load(example(name), name) == []
    drawn = opened.drawn()
    assert set(ids_of(name)) <= set(drawn)
    for one, other in combinations(ids_of(name), 2):
        assert not meet(drawn[one]["box"], drawn[other]["box"]), (one, other)


def test_what_nodes_say_stands_in_them(opened: FrontEnd, server: Server) -> None:
    """The lines are read on the node, and no box is larger than the node around it."""
    name = "05_two_phase_experts"
    opened.load(example(name), name)
    server.wait(opened.run(twin(name)))
    opened.page.wait_for_timeout(1000)
    drawn = opened.drawn()
    _, loader = ids_of(name, "FewStepLoraLoader")
    (info,) = ids_of(name, "FewStepRecipeInfo")
    assert "All 2 phases: high_noise, low_noise." in drawn[loader]["text"]
    assert "expert    low_noise: step 3, 4" in drawn[info]["text"]
    for one in (loader, info):
        assert "few_step_text" not in drawn[one]["text"]  # no label
        text = opened.page.locator(f'[data-node-id="{one}"] pre').bounding_box()
        box = drawn[one]["box"]
        assert box["top"] < text["y"] < text["y"] + text["height"] < box["bottom"]
        assert box["left"] < text["x"] < text["x"] + text["width"] < box["right"]


def test_a_long_text_scrolls(opened: FrontEnd, server: Server) -> None:
    """A node does not grow beyond its eighteen lines."""
    opened.load({"nodes": [], "links": [], "groups": [], "version": 0.4}, "one")
    found = opened.page.evaluate(
        "() => { const node = LiteGraph.createNode('FewStepRecipeInfo'); node.pos = [100, 100];"
        " app.graph.add(node); return String(node.id); }"
    )
    read = {"class_type": "FewStepRecipeInfo", "inputs": {"lora_name": "tiny-dmd2.safetensors"}}
    server.wait(opened.run({found: read}))
    opened.page.wait_for_timeout(1000)
    inside, whole = opened.page.locator(f'[data-node-id="{found}"] pre').evaluate(
        "(box) => [box.clientHeight, box.scrollHeight]"
    )
    assert inside == 18 * 15 + 10 < whole


def test_widgets_change_what_run_would_send(opened: FrontEnd) -> None:
    name = "01_few_step_quickstart"
    opened.load(example(name), name)
    loader = node_of(opened, name, "FewStepLoraLoader")
    for label in ("lora_name", "strength"):
        assert label in loader.inner_text()
    strength = loader.get_by_role("spinbutton")
    strength.focus()
    strength.press("Control+a")
    strength.press_sequentially("0.5")
    strength.press("Enter")
    strength.blur()
    (key,) = ids_of(name, "FewStepLoraLoader")
    assert opened.graph()[str(key)]["inputs"]["strength"] == 0.5


def test_tooltips_are_there(opened: FrontEnd) -> None:
    name = "01_few_step_quickstart"
    opened.load(example(name), name)
    node_of(opened, name, "FewStepLoraLoader").get_by_text("lora_name").first.hover()
    told = opened.page.get_by_text("Adapter file in models/loras.").first
    told.wait_for(timeout=TOOLTIP_MS)
