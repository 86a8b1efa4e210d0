"""The demo's report for people, and the four promises it is held to."""

from typing import Any

from fewstep.digits.rows import Row

COLUMNS = ("frechet", "accuracy", "recall", "precision", "diversity")


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """The promises: what the 4-step student must reach beside its teacher, and whether it does."""
    most, few, student = (
        next(row for row in rows if (row.name, row.steps) == wanted)
        for wanted in (("teacher", 50), ("teacher", 4), ("student", 4))
    )
    return [
        _verdict("Frechet, to the teacher's 50 steps", student.frechet / most.frechet, most=1.25),
        _verdict("Frechet, to the teacher's 4 steps", student.frechet / few.frechet, most=0.5),
        _verdict("accuracy, to the teacher's", student.accuracy / most.accuracy, least=0.97),
        _verdict("recall, to the teacher's", student.recall / most.recall, least=0.85),
    ]


def beside_stock(rows: list[Row]) -> float:
    """Student's Frechet at 4 steps over the teacher's with its stock scheduler, 4 steps."""
    *_, stock = (row for row in rows if (row.name, row.steps) == ("teacher", 4))
    student = next(row for row in rows if (row.name, row.steps) == ("student", 4))
    return student.frechet / stock.frechet


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
        "| who | sampler | steps | NFE | " + " | ".join(COLUMNS) + " | s/image |",
        "| --- " * (len(COLUMNS) + 5) + "|",
    ]
    for row in report["rows"]:
        values = " | ".join(f"{row[name]:.3g}" for name in COLUMNS)
        lines.append(
            f"| {row['name']} | {row['sampler']} | {row['steps']} | {row['nfe']} | {values} | "
            f"{row['seconds_per_image']:.3f} |"
        )
    lines += ["", f"A perfect sampler would score about {report['frechet_floor']:.2f}.", ""]
    lines += ["| student / teacher | ratio | wanted | |", "| --- | --- | --- | --- |"]
    for verdict in report["verdicts"]:
        mark = "holds" if verdict["holds"] else "missed"
        lines.append(
            f"| {verdict['ratio_of']} | {verdict['ratio']:.3f} | {verdict['wanted']} | {mark} |"
        )
    lines += [
        "",
        "The ratios are to the teacher on an evenly spaced grid. Beside what the stock pipeline "
        f"gives in 4 steps the student's Frechet distance is {report['beside_stock']:.3f} times.",
    ]
    return "\n".join(lines) + "\n"
