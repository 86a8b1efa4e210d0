"""A diagnosis for people: the grids side by side, what was measured, the findings, other hosts."""

import textwrap
from collections.abc import Sequence

from fewstep.doctor.finding import Diagnosis
from fewstep.doctor.seen import SeenRun

WIDTH = 100
MARKS = {"error": "ERROR  ", "warning": "warning", "note": "note   "}


def to_text(diagnosis: Diagnosis) -> str:
    """Several lines, without markup or colour."""
    blocks = [
        [diagnosis.subject, f"recipe    {diagnosis.recipe_source or 'none found'}"],
        _measured(diagnosis),
        _grids(diagnosis),
        _findings(diagnosis),
        _comfyui(diagnosis),
        _runtime(diagnosis),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _runs(diagnosis: Diagnosis) -> list[tuple[str, SeenRun]]:
    runs = (("as called", diagnosis.as_called), ("with fewstep", diagnosis.with_fewstep))
    return [(name, run) for name, run in runs if run is not None]


def _measured(diagnosis: Diagnosis) -> list[str]:
    lines = []
    for name, run in _runs(diagnosis):
        lines.append(f"{name:<13} {run.scheduler}")
        if run.error is not None:
            lines += _wrapped("  failed: ", run.error)
            continue
        more = "" if run.is_complete else " or more"
        left = "" if run.leftover is None else f", {run.leftover:.2f} noise left"
        seed = {True: "the same twice", False: "NOT the same twice", None: "not run twice"}
        lines.append(
            f"  {run.nfe}{more} network calls per image ({run.passes:g} per step), "
            f"one seed gives {seed[run.is_repeatable]}{left}"
        )
    return lines


def _grids(diagnosis: Diagnosis) -> list[str]:
    runs = [(name, run) for name, run in _runs(diagnosis) if run.steps]
    columns = [name for name, _ in runs]
    trained = diagnosis.trained
    count = max([len(trained), *(len(run.steps) for _, run in runs)])
    if count == 0:
        return []
    if trained:
        columns = ["trained", *columns]
    lines = ["step" + "".join(f"{name:>22}" for name in columns)]
    lines.append("    " + f"{'timestep':>13}{'sigma':>9}" * len(columns))
    for index in range(count):
        cells = [_cell(trained[index] if index < len(trained) else None)] if trained else []
        for _, run in runs:
            cells.append(_cell(_seen(run, index) if index < len(run.steps) else None))
        lines.append(f"{index + 1:>4}" + "".join(cells))
    return lines


def _seen(run: SeenRun, index: int) -> tuple[float, float]:
    step = run.steps[index]
    return step.timestep, step.calls[0].noise if step.calls else step.sample_noise


def _cell(values: tuple[float, float] | None) -> str:
    return f"{'-':>13}{'-':>9}" if values is None else f"{values[0]:>13.2f}{values[1]:>9.4f}"


def _findings(diagnosis: Diagnosis) -> list[str]:
    if not diagnosis.findings:
        return ["nothing wrong was found"]
    lines: list[str] = []
    for finding in diagnosis.findings:
        lines += _wrapped(f"{MARKS[finding.severity]} {finding.code}: ", finding.sentence)
        lines += _wrapped("        do: ", finding.fix)
    return lines


def _wrapped(start: str, text: str) -> Sequence[str]:
    safe = "".join(c if c.isprintable() else "?" for c in text)  # names come from files
    return textwrap.wrap(
        start + safe, WIDTH, subsequent_indent="            ", break_on_hyphens=False
    )


def _comfyui(diagnosis: Diagnosis) -> list[str]:
    settings = diagnosis.comfyui
    if settings is None:
        return []
    lines = ["in ComfyUI", *(f"  {node}" for node in settings.nodes)]
    return lines + [f"  note: {note}" for note in settings.notes]


def _runtime(diagnosis: Diagnosis) -> list[str]:
    if not diagnosis.runtime:
        return []
    lines = ["without torch (x = alpha * x0 + sigma * noise)"]
    lines.append(f"  {'timestep':>10}{'alpha':>10}{'sigma':>10}")
    for level in diagnosis.runtime:
        lines.append(f"  {level.timestep:>10.3f}{level.alpha:>10.6f}{level.sigma:>10.6f}")
    return lines
