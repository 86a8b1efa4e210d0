"""The gate's findings as one HTML file that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib.resources import files

import numpy as np
from PIL import Image

from fewstep.export.checking.findings import Findings, Pair
from fewstep.export.checking.limits import is_within
from fewstep.export.checking.speed import Times
from fewstep.runtime.manifest import Measured

MOST_PICTURES = 4
"""Per case: the others are in the figures."""
SIDE_PX = 192
LARGEST_GAIN = 32


def to_html(findings: Findings) -> str:
    """The whole report."""
    verdict = "passes" if findings.is_good else "is refused"
    kind = "good" if findings.is_good else "bad"
    title = f"{findings.label}: {verdict}"
    against = f"held against {findings.reference}" if findings.reference else "held against nothing"
    parts = [
        f"<header class={kind}><h1>{_text(title)}</h1><p>{_text(against)}</p>",
        *(f"<p>{_text(problem)}</p>" for problem in findings.problems),
        "</header>",
        _section("Pictures", "".join(_case(pair) for pair in findings.pairs)),
        _section("Speed on this machine", _times(findings.times)),
    ]
    for heading, rows in _groups(findings.measured):
        parts.append(_section(heading, _table(rows)))
    notes = "".join(f"<li>{_text(note)}</li>" for note in findings.notes)
    parts.append(_section("Notes", f"<ul>{notes}</ul>" if notes else ""))
    style = (files("fewstep.export.checking") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _groups(measured: Sequence[Measured]) -> Iterable[tuple[str, list[Measured]]]:
    timed = ("ms", "ratio of time")
    images = [m for m in measured if m.what == "image"]
    steps = [m for m in measured if m.what == "latents"]
    others = [m for m in measured if m.what not in ("image", "latents") and m.unit not in timed]
    yield "Pictures in figures", images
    yield "Latents after each step", steps
    yield "Components on the same inputs", others


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{_text(heading)}</h2>{body}</section>" if body else ""


def _table(rows: Sequence[Measured]) -> str:
    """One row per place, one column per unit."""
    if not rows:
        return ""
    units = list(dict.fromkeys(row.unit for row in rows))
    places = list(dict.fromkeys((row.what, row.where) for row in rows))
    known = {(row.what, row.where, row.unit): row for row in rows}
    head = "".join(f"<th>{_text(unit)}</th>" for unit in units)
    body = []
    for what, where in places:
        cells = "".join(_cell(known.get((what, where, unit))) for unit in units)
        body.append(f"<tr><td>{_text(what)}</td><td>{_text(where)}</td>{cells}</tr>")
    return f"<table><tr><th></th><th></th>{head}</tr>{''.join(body)}</table>"


def _cell(measured: Measured | None) -> str:
    if measured is None:
        return "<td></td>"
    kind = "" if measured.limit is None else "good" if is_within(measured) else "bad"
    limit = "" if measured.limit is None else f"<small>limit {measured.limit:g}</small>"
    return f'<td class="number {kind}">{measured.value:.4g}{limit}</td>'


def _times(times: Sequence[Times]) -> str:
    if not times:
        return ""
    widest = max(max(one.reference_ms, one.candidate_ms) for one in times)
    rows = []
    for one in times:
        bars = "".join(
            f'<div class="bar {name}" style="width:{max(value / widest * 100, 1):.1f}%"></div>'
            for name, value in (("before", one.reference_ms), ("after", one.candidate_ms))
        )
        rows.append(
            f"<tr><td>{_text(one.what)}</td><td>{_text(one.where)}</td>"
            f'<td class="bars">{bars}</td>'
            f'<td class="number">{one.reference_ms:.2f}</td>'
            f'<td class="number">{one.candidate_ms:.2f}</td>'
            f'<td class="number">{one.ratio:.2f}<small>{one.low:.2f} to {one.high:.2f}, '
            f"{one.repeats} in turns</small></td></tr>"
        )
    head = "<tr><th></th><th></th><th></th><th>before, ms</th><th>after, ms</th><th>ratio</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _case(pair: Pair) -> str:
    figures = ", ".join(f"{m.unit} {m.value:.4g}" for m in pair.measured)
    rows = []
    for index in range(min(len(pair.wanted), MOST_PICTURES)):
        wanted, found = pair.wanted[index], pair.found[index]
        gap, gain = amplified(wanted, found)
        label = f"difference × {gain}" if gain else "no difference"
        shown = ((wanted, "reference"), (found, "this folder"), (gap, label))
        cells = "".join(_picture(pixels, caption) for pixels, caption in shown)
        prompt = pair.case.prompts[index][:120]
        rows.append(f'<div class="row">{cells}<p class="prompt">{_text(prompt)}</p></div>')
    title = f"<h3>{_text(pair.case.name)} <small>{_text(figures)}</small></h3>"
    return f"<article>{title}{''.join(rows)}</article>"


def amplified(wanted: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, int]:
    """The difference of two pictures, multiplied until it can be seen.

    Args:
        wanted: uint8, shape (H, W, 3).
        found: The same.

    Returns:
        uint8 of the same shape, and the factor: a power of two, 0 for equal pictures.
    """
    gap = np.abs(wanted.astype(np.int32) - found.astype(np.int32))
    largest = int(gap.max())
    if not largest:
        return gap.astype(np.uint8), 0
    gain = 1
    while gain < LARGEST_GAIN and largest * gain * 2 <= 255:
        gain *= 2
    return (gap * gain).clip(0, 255).astype(np.uint8), gain


def _picture(pixels: np.ndarray, caption: str) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    shown = max(SIDE_PX, min(pixels.shape[1], 512))
    return (
        f'<figure><img width="{shown}" src="data:image/png;base64,{data}" alt="{_text(caption)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _text(value: str) -> str:
    return html.escape(value)
