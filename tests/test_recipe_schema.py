"""docs/recipe.schema.json and docs/recipes.md say what the code does."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fewstep.recipe import FewStepRecipe, json_schema

DOCS = Path(__file__).parents[1] / "docs"
REWRITE = (
    'python -c "import json; from fewstep.recipe import json_schema; '
    'print(json.dumps(json_schema(), indent=2))" > docs/recipe.schema.json'
)
PAGE = (DOCS / "recipes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def example() -> Any:
    return json.loads(blocks("json")[0])


def published() -> Any:
    return json.loads((DOCS / "recipe.schema.json").read_text(encoding="utf-8"))


def test_the_published_schema_is_current() -> None:
    assert published() == json_schema(), f"run: {REWRITE}"


def test_the_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(published())
    assert published()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_schema_accepts_recipes_written_by_hand_and_by_us() -> None:
    jsonschema.validate(example(), published())
    recipe = FewStepRecipe.from_json(json.dumps(example()))
    jsonschema.validate(json.loads(recipe.to_json()), published())


Change = Callable[[Any], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(stepz=4), "'stepz' was unexpected"),
        (lambda data: data["sampler"].update(gamma=1), "'gamma' was unexpected"),
        (lambda data: data["grids"][0].update(sigma=[1]), "'sigma' was unexpected"),
        (lambda data: data["base"]["schedule"].update(beta=1), "'beta' was unexpected"),
        (lambda data: data["experts"][0].update(name="a"), "'name' was unexpected"),
        (lambda data: data.update(default_steps="4"), "'4' is not of type 'integer'"),
        (lambda data: data.update(default_steps=True), "True is not of type 'integer'"),
        (lambda data: data["sampler"].update(kind="lcm"), "'lcm' is not one of"),
        (lambda data: data.update(format="fewstep.recipe/2"), "'fewstep.recipe/1' was expected"),
        (lambda data: data.pop("format"), "'format' is a required property"),
        (lambda data: data["base"].pop("family"), "'family' is a required property"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(change: Change, said: str) -> None:
    data = example()
    change(data)
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.validate(data, published())
    assert said in caught.value.message
    with pytest.raises(ValueError, match=r"."):
        FewStepRecipe.from_json(json.dumps(data))


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of docs/recipes.md, in order, the JSON saved under the name the text gives."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fewstep_recipe.json").write_text(blocks("json")[0], encoding="utf-8")
    codes = blocks("python")
    assert len(codes) == 2
    for code in codes:
        exec(compile(code, "docs/recipes.md", "exec"), {})


def test_the_page_names_every_part_of_a_recipe() -> None:
    parts = [*json_schema()["properties"]]
    missing = [name for name in parts if name not in PAGE and name != "resolution_shift"]
    assert missing == []
