"""docs/papers.md says of every method what the method says of itself, and names real tests."""

import re
from pathlib import Path

import pytest

from fewstep.trainer.methods.methods import METHODS
from fewstep.trainer.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
NAMED = (
    "dmd dmd2 dmd2-gan decoupled-dmd phased-dmd tdm dp-dmd cdm senseflow swd f-distill "
    "embedding-loss disback dmdr uni-dad msd sid sid-few-step sim realuid lcm tcd sfd "
    "progressive meanflow wadi"
).split()


def row(name: str) -> list[str]:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_all_named_methods_are_there() -> None:
    assert set(NAMED) <= set(METHODS)
    assert set(METHODS) <= set(RECIPES)


@pytest.mark.parametrize("name", METHODS)
def test_the_page_says_what_the_method_says(name: str) -> None:
    facts = METHODS[name].facts
    _, paper, components, equation, deviations, test = row(name)
    assert facts.name == name
    assert paper == facts.paper
    assert len(components) > 5
    assert equation == facts.equation
    assert deviations == (facts.deviations or "none")
    assert (ROOT / test.strip("`")).exists()


@pytest.mark.parametrize("name", NAMED)
def test_every_paper_has_a_number(name: str) -> None:
    assert re.search(r"arXiv:\d{4}\.\d{5}", METHODS[name].facts.paper)
