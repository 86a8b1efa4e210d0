"""The report's figures: one table per kind, each with a caption that says how to read it."""

import html
from collections.abc import Sequence

from fewstep.export.checking.limits import EQUAL_DB, HIGHER_IS_BETTER, NO_NUMBER, is_within
from fewstep.export.checking.speed import Times
from fewstep.runtime.manifest import Measured

TIMED = ("ms", "ratio of time")
HEADINGS = {
    "dB": "PSNR, dB",
    "max error": "largest error",
    "max error of 255": "error of 255",
    "of 255": "error of 255",
}
"""Unit -> what stands above its column, where that says more."""
PICTURES = "The worst picture of each case."
LATENTS = "Each side on its own path; where there is a limit, the last step has to keep it."
COMPONENTS = "Each graph on the reference's own inputs; relative to the largest value."
FUSED = "The one graph for the whole pipeline, held against this folder's components: a pixel."


def figure_tables(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """Headings and tables of everything but times; a table without rows is left out."""
    plain = [m for m in measured if m.unit not in TIMED]
    of = {kind: [m for m in plain if m.what == kind] for kind in ("image", "latents", "fused")}
    others = [m for m in plain if m.what not in of]
    found = [
        ("Pictures in figures", of["image"], PICTURES),
        ("Latents after each step", of["latents"], LATENTS),
        ("Components on the same inputs", others, COMPONENTS),
        ("The fused graph", of["fused"], FUSED),
    ]
    return [(heading, _table(rows, caption)) for heading, rows, caption in found if rows]


def times_table(times: Sequence[Times]) -> str:
    """One row per artefact, bars by the slower side of the row."""
    if not times:
        return ""
    caption = (
        "Medians of calls made in turns; below the ratio are its quartiles."
        "<span class=bars> Grey is the reference, blue this folder, each row by its longer one."
        "</span>"
    )
    heads = ("", "", "reference, ms", "this folder, ms", "ratio")
    cells = [f"<th scope=col>{head}</th>" for head in heads]
    cells.insert(2, "<th scope=col class=bars></th>")
    body = "".join(_time(one) for one in times)
    return (
        f"<table><caption>{caption}</caption><thead><tr>{''.join(cells)}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _time(one: Times) -> str:
    longest = max(one.reference_ms, one.candidate_ms)
    bars = "".join(
        f'<div class="bar {name}" style="width:{max(value / longest * 100, 1):.1f}%"></div>'
        for name, value in (("before", one.reference_ms), ("after", one.candidate_ms))
    )
    return (
        f"<tr><th scope=row>{html.escape(one.what)}</th><td>{html.escape(one.where)}"
        f"<small>{one.repeats} turns</small></td>"
        f'<td class="bars">{bars}</td>'
        f'<td class="number">{_ms(one.reference_ms)}</td>'
        f'<td class="number">{_ms(one.candidate_ms)}</td>'
        f'<td class="number">{one.ratio:.2f}<small>{one.low:.2f} to {one.high:.2f}'
        f"</small></td></tr>"
    )


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _table(rows: Sequence[Measured], caption: str) -> str:
    """One row per place, one column per unit; a name that all rows share is not repeated."""
    units = list(dict.fromkeys(row.unit for row in rows))
    places = list(dict.fromkeys((row.what, row.where) for row in rows))
    known = {(row.what, row.where, row.unit): row for row in rows}
    is_named = len({what for what, _ in places}) > 1
    head = "".join(_heading(unit, rows) for unit in units)
    body, last = [], ""
    for what, where in places:
        name = f"<th scope=row>{html.escape(what) if what != last else ''}</th>" if is_named else ""
        last = what
        cells = "".join(_cell(known.get((what, where, unit))) for unit in units)
        body.append(f"<tr>{name}<td>{html.escape(where)}</td>{cells}</tr>")
    empty = "<td></td>" * (2 if is_named else 1)
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{empty}{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _heading(unit: str, rows: Sequence[Measured]) -> str:
    """The unit, and the limits that its figures have."""
    limits = sorted({row.limit for row in rows if row.unit == unit and row.limit is not None})
    word = "at least" if unit in HIGHER_IS_BETTER else "at most"
    told = ", ".join(f"{limit:g}" for limit in limits)
    small = f"<small>{word} {told}</small>" if told else ""
    return f"<th scope=col>{html.escape(HEADINGS.get(unit, unit))}{small}</th>"


def _cell(measured: Measured | None) -> str:
    if measured is None:
        return "<td></td>"
    kind = "" if measured.limit is None else "good" if is_within(measured) else "bad"
    missed = "<small>missed</small>" if kind == "bad" else ""
    return f'<td class="number {kind}">{figure(measured)}{missed}</td>'


def figure(measured: Measured) -> str:
    """A figure for people."""
    if measured.unit == "dB" and measured.value >= EQUAL_DB:
        return "equal"
    if measured.value >= NO_NUMBER:
        return "no number"
    digits = 4 if measured.unit in HIGHER_IS_BETTER else 3
    return f"{measured.value:.{digits}g}"
