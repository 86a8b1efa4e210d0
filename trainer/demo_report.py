"""The demo's report for people, and the four promises it is held to."""

from typing import Any

from fewstep.digits.rows import Row

COLUMNS = ("frechet", "accuracy", "recall", "precision", "diversity")


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """The promises: what the 4-step student must reach beside its teacher, and whether it does."""
    teacher = {row.steps: row for row in rows if row.name == "teacher"}
    student = next(row for row in rows if row.name == "student" and row.steps == 4)
    most, few = teacher[50], teacher[4]
    return [
        _verdict("Frechet, to the teacher's 50 steps", student.frechet / most.frechet, most=1.25),
        _verdict("Frechet, to the teacher's 4 steps", student.frechet / few.frechet, most=0.5),
        _verdict("accuracy, to the teacher's", student.accuracy / most.accuracy, least=0.97),
        _verdict("recall, to the teacher's", student.recall / most.recall, least=0.85),
    ]


def _verdict(
    what: str, ratio: float, *, most: float = float("inf"), least: float = 0.0
) -> dict[str, Any]:
    wanted = f"<= {most:g}" if least == 0.0 else f">= {least:g}"
    return {"ratio_of": what, "ratio": ratio, "wanted": wanted, "holds": least <= ratio <= most}


def report_markdown(report: dict[str, Any]) -> str:
    """report.json as a page."""
    lines = [
        f"# {report['teacher']} in few steps",
        "",
        f"{report['rows'][0]['num_images']} pictures per row, classes balanced; teacher guidance "
        f"scale {report['guidance_scale']:g} in every row; features of the shipped classifier.",
        f"Training {report['minutes_training']:.1f} minutes, everything "
        f"{report['minutes_total']:.1f} minutes.",
        "",
        "| sampler | steps | NFE | " + " | ".join(COLUMNS) + " | s/image |",
        "| --- " * (len(COLUMNS) + 4) + "|",
    ]
    for row in report["rows"]:
        values = " | ".join(f"{row[name]:.3g}" for name in COLUMNS)
        lines.append(
            f"| {row['name']} | {row['steps']} | {row['nfe']} | {values} | "
            f"{row['seconds_per_image']:.3f} |"
        )
    lines += ["", f"A perfect sampler would score about {report['frechet_floor']:.2f}.", ""]
    lines += ["| student / teacher | ratio | wanted | |", "| --- | --- | --- | --- |"]
    for verdict in report["verdicts"]:
        mark = "holds" if verdict["holds"] else "missed"
        lines.append(
            f"| {verdict['ratio_of']} | {verdict['ratio']:.3f} | {verdict['wanted']} | {mark} |"
        )
    return "\n".join(lines) + "\n"
