"""fewstep/errors.py: one root, the built-in kin that callers expect, and the tree as drawn."""

import inspect
import re

import pytest

from fewstep import errors
from fewstep.errors import FewstepError, MissingExtraError, RecipeError, RecipeVersionError

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, FewstepError) and kind is not FewstepError
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_a_fewstep_error_and_a_built_in_one(kind: type[FewstepError]) -> None:
    built_in = {ValueError, LookupError, RuntimeError, ImportError}
    assert built_in & set(kind.__mro__)
    assert kind.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_the_docstring_draws_every_error_with_its_kin(kind: type[FewstepError]) -> None:
    line = re.search(rf"\+-- {kind.__name__}( \((\w+)\))? ", f"{errors.__doc__}")
    assert line is not None
    if line[2]:
        assert line[2] in [parent.__name__ for parent in kind.__bases__]


def test_the_docstring_draws_no_error_that_does_not_exist() -> None:
    drawn = set(re.findall(r"\+-- (\w+)", f"{errors.__doc__}"))
    assert drawn == {kind.__name__ for kind in KINDS}


def test_a_newer_recipe_is_also_a_recipe_error() -> None:
    assert issubclass(RecipeVersionError, RecipeError)


def test_a_missing_extra_names_the_command() -> None:
    message = str(MissingExtraError("onnx", "export"))
    assert message == 'onnx is not installed; run: pip install "fewstep[export]"'
