"""The gate's findings as one HTML file that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import Image

from fewstep.errors import ExportError
from fewstep.export.checking.findings import Findings, Pair, in_words, worst_of_each
from fewstep.export.checking.report_tables import figure, figure_tables, times_table
from fewstep.runtime.cache_folder import write_whole
from fewstep.runtime.manifest import Measured

MOST_PICTURES = 4
"""Per case: the others are in the figures."""
SIDE_PX, LARGEST_PX = 192, 320
LONGEST_PROMPT = 120
LARGEST_GAIN = 32


def save_report(file: Path, findings: Findings) -> None:
    """Write the report.

    Args:
        file: HTML file, written whole or not at all.
        findings: What it tells.

    Raises:
        ExportError: It cannot be written.
    """
    try:
        write_whole(file, to_html(findings))
    except OSError as error:
        raise ExportError(
            f"the report {file} cannot be written ({error.strerror or error}); name another place "
            "with --report, or make room"
        ) from None


def to_html(findings: Findings) -> str:
    """The whole report."""
    sections = [
        ("Pictures", "".join(_case(pair) for pair in findings.pairs)),
        ("Speed on this machine", times_table(findings.times)),
        *figure_tables(findings.measured),
        ("Notes", _list(findings.notes)),
    ]
    title = _title(findings)
    body = "".join(
        f"<section><h2>{heading}</h2>{inner}</section>" for heading, inner in sections if inner
    )
    style = (files("fewstep.export.checking") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>"
        f"<body><main>{_verdict(findings)}{body}</main></body></html>\n"
    )


def _title(findings: Findings) -> str:
    return f"{findings.label} {'passes' if findings.is_good else 'is refused'}"


def _verdict(findings: Findings) -> str:
    """What came of it, with every reason against it and every doubt."""
    limited = [m for m in findings.measured if m.limit is not None]
    kept = len(limited) - len(findings.missed)
    against = f"Held against {findings.reference or 'nothing'}"
    counted = f"; {kept} of {len(limited)} figures with a limit keep it." if limited else "."
    missed = (in_words(m) for m in worst_of_each(findings.missed))
    reasons = (*findings.problems, *missed, *findings.doubts)
    kind = "good" if findings.is_good else "bad"
    return (
        f"<header class={kind}><h1>{_text(_title(findings))}</h1><p>{_text(against)}{counted}</p>"
        f"{_list(reasons)}</header>"
    )


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _case(pair: Pair) -> str:
    rows = []
    for index in range(min(len(pair.wanted), MOST_PICTURES)):
        wanted, found = pair.wanted[index], pair.found[index]
        gap, gain = amplified(wanted, found)
        label = f"{gain} x difference" if gain else "no difference"
        shown = ((wanted, "reference"), (found, "this folder"), (gap, label))
        cells = "".join(_picture(pixels, caption) for pixels, caption in shown)
        prompt = shorten(pair.case.prompts[index], LONGEST_PROMPT, placeholder=" ...")
        rows.append(f'<p class="prompt">{_text(prompt)}</p><div class="row">{cells}</div>')
    title = f"<h3>{_text(pair.case.name)} <small>{_text(_in_short(pair.measured))}</small></h3>"
    hidden = len(pair.wanted) - len(rows)
    more = f'<p class="prompt">and {hidden} more, not shown</p>' if hidden else ""
    return f"<article>{title}{''.join(rows)}{more}</article>"


def _in_short(measured: Sequence[Measured]) -> str:
    """The worst picture's figures in a line."""
    known = {m.unit: m for m in measured}
    if known["max error of 255"].value == 0:
        return "equal to the last bit"
    error, psnr, ssim = (figure(known[unit]) for unit in ("max error of 255", "dB", "SSIM"))
    return f"worst picture: {error} of 255, {psnr} dB, SSIM {ssim}"


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
    shown = max(SIDE_PX, min(pixels.shape[1], LARGEST_PX))
    return (
        f'<figure style="max-width:{shown}px">'
        f'<img src="data:image/png;base64,{data}" alt="{_text(caption)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _text(value: str) -> str:
    return html.escape(value)
