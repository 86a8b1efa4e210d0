"""docs/doctor.md names every pain's test and every finding there is."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
AREAS = "grid|sampler|guidance|noise|adapter|recipe|pipeline|dtype|saving|comfyui|experts"
CODE = re.compile(rf'"((?:{AREAS})/[a-z-]+)"')


def test_every_pain_has_a_test_that_the_page_names() -> None:
    rows = re.findall(r"^\| (\d+) \|.*?\| (`[^|]*) \| `", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 19))
    tests = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "tests/pains").glob("*.py")
    )
    for number, named in rows:
        for start in re.findall(r"`([a-z0-9_]+?)_?(?:\.\.\.)?`", named):
            assert start.startswith(f"test_{number}")
            assert f"def {start}" in tests, start


def test_the_page_names_every_finding_and_no_other() -> None:
    sources = (ROOT / "fewstep/doctor").glob("*.py")
    known = {code for path in sources for code in CODE.findall(path.read_text(encoding="utf-8"))}
    assert len(known) > 30
    named = set(re.findall(r"`([a-z]+/[a-z-]+)`", PAGE))
    assert known == named
