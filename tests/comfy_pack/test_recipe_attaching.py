"""Names of copies that carry a recipe."""

import pytest

from fewstep.comfy_nodes.recipe_attaching import copy_name
from fewstep.errors import ConfigError


@pytest.mark.parametrize(
    ("wanted", "lora", "name"),
    [
        ("", "a.safetensors", "a-few-step.safetensors"),
        ("", "sdxl/style.v2.safetensors", "style.v2-few-step.safetensors"),
        ("", "sdxl\\style.pt", "style-few-step.safetensors"),
        ("mine", "a.safetensors", "mine.safetensors"),
        (" mine v1.1 ", "a.safetensors", "mine v1.1.safetensors"),
        ("mine.safetensors", "a.safetensors", "mine.safetensors"),
    ],
)
def test_a_copy_has_a_name(wanted: str, lora: str, name: str) -> None:
    assert copy_name(wanted, lora) == name


@pytest.mark.parametrize(
    "wanted", ["../a", "a/b", "a\\b", "C:a", "/etc/x", "..", ".hidden", "a\nb", "a|b", "a?"]
)
def test_a_name_with_a_path_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match="is not a plain file name"):
        copy_name(wanted, "a.safetensors")
