"""What people expect beside the nodes: workflows, help pages, languages. No ComfyUI."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.test_layout import ROOT

PACK = ROOT / "comfy_nodes"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
LANGUAGES = ("en", "ja", "zh")
NODES = sorted(
    found
    for file in PACK.glob("nodes_*.py")
    for found in re.findall(r'node_id="(\w+)"', file.read_text(encoding="utf-8"))
)
BREAKS_TRANSLATION = re.compile(r"[@{}|$]")
"""The front end reads these as commands of its translations."""
DOWNLOAD = re.compile(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+\.safetensors")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def words(language: str) -> dict[str, Any]:
    return read(PACK / "locales" / language / "nodeDefs.json")


def texts(node: dict[str, Any]) -> list[str]:
    """Every text of a node in a language."""
    sockets = [*node["inputs"].values(), *node["outputs"].values()]
    pairs = [text for socket in sockets for text in (socket["name"], socket["tooltip"])]
    return [node["display_name"], node["description"], *pairs]


def keys(node: dict[str, Any]) -> list[str]:
    return [*node["inputs"], *(f"output {key}" for key in node["outputs"])]


def help_page(node: str, language: str) -> str:
    folder = PACK / "web" / "docs"
    path = folder / f"{node}.md" if language == "en" else folder / node / f"{language}.md"
    return path.read_text(encoding="utf-8")


def test_there_are_ten_nodes_and_nine_workflows() -> None:
    assert (len(NODES), len(WORKFLOWS)) == (10, 9)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_whole(path: Path) -> None:
    """It parses, has a note and a thumbnail, and offers its models for download."""
    workflow = read(path)
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1
    (text,) = notes[0]["widgets_values"]
    used = {node["type"] for node in workflow["nodes"] if "FewStep" in node["type"]}
    assert used <= set(NODES)
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", ()):
            assert DOWNLOAD.fullmatch(model["url"])
            assert model["url"].endswith(f"/{model['name']}")
            assert model["name"] in node["widgets_values"]
            assert model["url"] in text
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size <= 40_000
    with Image.open(thumbnail) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (400, 400)


def test_every_node_but_the_file_tools_is_in_a_workflow() -> None:
    used = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    assert set(NODES) - used == {"FewStepAttachRecipe", "FewStepEngineLoader"}


def test_the_blueprint_is_one_subgraph() -> None:
    (path,) = (PACK / "subgraphs").glob("*.json")
    blueprint = read(path)
    (node,), (inside,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert node["type"] == inside["id"]
    assert inside["name"] == path.stem


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_node(language: str) -> None:
    assert sorted(words(language)) == NODES
    assert set(read(PACK / "locales" / language / "main.json")["nodeCategories"]) == {
        *("few-step", "recipe")
    }


@pytest.mark.parametrize("node", NODES)
def test_languages_have_the_same_keys(node: str) -> None:
    english = words("en")[node]
    for language in LANGUAGES:
        translated = words(language)[node]
        assert keys(translated) == keys(english)
        assert all(text.strip() for text in texts(translated))
        assert not any(BREAKS_TRANSLATION.search(text) for text in texts(translated))
        if language != "en":
            assert translated["description"] != english["description"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", NODES)
def test_a_help_page_tells_every_input_and_output(node: str, language: str) -> None:
    page, known = help_page(node, language), words(language)[node]
    assert page.startswith(f"# {known['display_name']}\n")
    for name in known["inputs"]:
        assert re.search(rf"^\| `{name}`", page, re.MULTILINE), name
    for socket in known["outputs"].values():
        assert f"\n| {socket['name']} |" in page
    assert page.count("\n## ") >= 3


def test_examples_in_help_pages_exist() -> None:
    stems = {path.stem for path in WORKFLOWS}
    for node in NODES:
        named = set(re.findall(r"`(\d\d_\w+)`", help_page(node, "en")))
        assert named <= stems
        types = {name: PACK / "example_workflows" / f"{name}.json" for name in named}
        for path in types.values():
            assert node in {one["type"] for one in read(path)["nodes"]}, f"{node} in {path.stem}"
