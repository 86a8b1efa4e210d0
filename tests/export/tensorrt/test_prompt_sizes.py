"""Prompt lengths that engines are built for are those the runtime feeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.export.tensorrt.sizes import SizeRange, prompt_range
from fewstep.recipe import SIDECAR_NAME
from fewstep.runtime.manifest import FORMAT, MAJOR, Manifest
from tests.tiny.recipes import flow_recipe


def manifest_of(family: str, **settings: float) -> Manifest:
    """A manifest without graphs."""
    return Manifest(
        format=f"{FORMAT}/{MAJOR}",
        family=family,
        pipeline="",
        precision="fp32",
        settings=settings,
        graphs={},
    )


@pytest.mark.parametrize(
    ("family", "stated", "wanted"),
    [
        ("sd3", None, {"text_encoder": 77, "text_encoder_3": 256, "transformer": 333}),
        ("sd3", 128, {"text_encoder_2": 77, "text_encoder_3": 128, "transformer": 205}),
        ("flux", None, {"text_encoder": 77, "text_encoder_2": 512, "transformer": 512}),
        ("flux", 256, {"text_encoder": 77, "text_encoder_2": 256, "transformer": 256}),
    ],
)
def test_clip_and_t5(
    family: str, stated: int | None, wanted: dict[str, int], tmp_path: Path
) -> None:
    recipe = flow_recipe(family)
    base = replace(recipe.base, max_sequence_length=stated)
    (tmp_path / SIDECAR_NAME).write_text(replace(recipe, base=base).to_json())
    manifest = manifest_of(family, tokenizer_max_length=77)
    found = {name: prompt_range(tmp_path, manifest, name) for name in wanted}
    assert found == {name: SizeRange(count, count, count) for name, count in wanted.items()}


def test_one_encoder(tmp_path: Path) -> None:
    assert prompt_range(tmp_path, manifest_of("sd15"), "unet") == SizeRange(77, 77, 77)
    (tmp_path / "text_encoder").mkdir()
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({"max_position_embeddings": 8}))
    assert prompt_range(tmp_path, manifest_of("sd15"), "unet") == SizeRange(8, 8, 8)
    longer = manifest_of("sana", tokenizer_max_length=50, max_sequence_length=300)
    assert prompt_range(tmp_path, longer, "transformer") == SizeRange(50, 50, 350)
