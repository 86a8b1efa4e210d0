"""Languages agree with the nodes as they are; English is what the nodes say themselves."""

import json
from typing import Any

import pytest

from tests.comfy.harness import PACK, Comfy
from tests.comfy.node_words import english

LOCALES = PACK / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())


def words(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_english_is_what_the_nodes_say(comfy: Comfy) -> None:
    """Else run `python -m tests.comfy.build_workflows`, and see to the other languages."""
    said = english(comfy.nodes())
    assert set(said) == set(words("en"))
    for name, node in said.items():
        assert words("en")[name] == node


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_socket_has_a_name_and_a_tooltip(language: str, comfy: Comfy) -> None:
    known = words(language)
    for name, said in english(comfy.nodes()).items():
        for part in ("inputs", "outputs"):
            assert list(known[name][part]) == list(said[part]), f"{name} {part}"
