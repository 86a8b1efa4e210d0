"""What a reader of the report is told, and in which order."""

import re
from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import ExportError
from fewstep.export.checking.drawing import Case
from fewstep.export.checking.findings import Findings, Pair
from fewstep.export.checking.limits import EIGHT_BITS, SLOWER
from fewstep.export.checking.parity import compare_pictures
from fewstep.export.checking.report import save_report, to_html
from fewstep.export.checking.speed import Times
from fewstep.runtime.manifest import Measured

CASE = Case("6 prompts", ("a <b> prompt",) * 6, (8, 8))
TIMES = Times("picture", "8x8, 4 steps", 10.0, 20.0, 2.0, 1.5, 2.5, 7)


def findings(found: np.ndarray, *, problems: tuple[str, ...] = ()) -> Findings:
    """White pictures held against others, and times that miss their limit."""
    wanted = np.full((6, 8, 8, 3), 255, np.uint8)
    measured = compare_pictures(CASE, wanted, found, EIGHT_BITS)
    graph = Measured(what="unet", where="one", value=2e-6, unit="relative error", limit=1e-3)
    return Findings(
        label="this fp32 folder",
        reference="torch",
        measured=(*measured, graph, *TIMES.measured(SLOWER)),
        problems=problems,
        pairs=(Pair(CASE, wanted, found, measured),),
        times=(TIMES,),
    )


def page(found: np.ndarray, **changes: tuple[str, ...]) -> str:
    return to_html(findings(found, **changes))


WHITE = np.full((6, 8, 8, 3), 255, np.uint8)


def test_the_verdict_comes_first_with_every_reason() -> None:
    told = page(np.zeros_like(WHITE), problems=("unet gives numbers that are none",))
    header = told.partition("</header>")[0]
    assert "this fp32 folder is refused" in header
    assert "Held against torch; 1 of 4 figures with a limit keep it." in header
    assert "unet gives numbers that are none" in header
    assert "image (6 prompts, 8x8) has dB 0, wanted at least 30" in header
    assert "picture takes 2 x the time of what it replaces, at most 1.05" in header
    assert told.index("</header>") < told.index("<section>")


def test_equal_pictures_are_called_equal() -> None:
    told = page(WHITE)
    assert "equal to the last bit" in told
    assert '<td class="number good">equal</td>' in told
    assert told.count("no difference</figcaption>") == 4
    assert "and 2 more, not shown" in told


def test_every_table_has_a_caption_and_every_column_a_heading() -> None:
    told = page(np.zeros_like(WHITE))
    tables = re.findall(r"<table>.*?</table>", told)
    assert len(tables) == 3
    for table in tables:
        assert table.startswith("<table><caption>")
        head, body = table.split("</thead>")
        columns = len(re.findall(r"<t[hd][ >]", head.partition("<thead>")[2]))
        for row in re.findall(r"<tr>(.*?)</tr>", body):
            assert len(re.findall(r"<t[hd][ >]", row)) == columns


def test_a_missed_limit_is_said_in_words_beside_its_heading() -> None:
    told = page(np.zeros_like(WHITE))
    assert "PSNR, dB<small>at least 30</small>" in told
    assert '<td class="number bad">0<small>missed</small></td>' in told
    assert '<td class="number good">2e-06</td>' in told


@pytest.mark.parametrize("word", ["viewport", "prefers-color-scheme: dark", "max-width: 640px"])
def test_it_fits_small_and_dark_screens(word: str) -> None:
    assert word in page(WHITE)


def test_without_figures_nothing_is_counted() -> None:
    told = to_html(Findings("this int4 folder", None))
    assert "Held against nothing.</p>" in told
    assert "<table>" not in told


def test_a_report_that_cannot_be_written_says_which_file_and_why(tmp_path: Path) -> None:
    taken = tmp_path / "report.html"
    taken.mkdir()
    same = findings(np.full((6, 8, 8, 3), 255, np.uint8))
    with pytest.raises(ExportError, match=r"report .*report\.html cannot be written \(.+\); name"):
        save_report(taken, same)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
