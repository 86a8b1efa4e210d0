"""The teachers' own rows of the demo's report, shipped with the checksum of their weights.

`python -m fewstep.digits.teacher_rows` measures them again (about ten minutes on two cores).
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.progress import Progress

from fewstep.digits.rows import Row
from fewstep.digits.weights import weights_checksum

GUIDANCE_SCALES = {"sd3": 1.2, "sd15": 2.0}
"""One scale for every row and for training of a teacher; why these: docs/digits.md."""
TEACHER_STEPS = (50, 4)
NUM_IMAGES = 2000
REPORT_SEED = 7
"""Pictures of the report; training, its evaluations and the choice of scales use other seeds."""
FILE = Path(__file__).parent / "teacher_rows.json"


def shipped_rows(teacher: str) -> list[Row] | None:
    """The precomputed rows, or None where they belong to other weights or another scale."""
    if not FILE.is_file():
        return None
    data = json.loads(FILE.read_text(encoding="utf-8"))
    is_current = (
        data["weights_sha256"] == weights_checksum() and data["guidance_scales"] == GUIDANCE_SCALES
    )
    return [Row.from_dict(row) for row in data["rows"][teacher]] if is_current else None


def measure_rows(teacher: str, progress: Progress | None = None) -> list[Row]:
    """Judge a teacher at 50 and 4 steps on an even grid, then at 4 steps with its stock scheduler.

    The even grid is the baseline a student is held to. SD3's stock grid of 4 wastes a step near
    sigma 0; its row is what a user of the stock pipeline gets, and is easier to beat.
    """
    from fewstep.digits.evaluate import judge_stock_teacher, judge_teacher
    from fewstep.digits.judge import DigitsJudge
    from fewstep.digits.teacher_sampler import load_teacher
    from fewstep.digits.weights import teacher_folder

    pipe, judge, scale = (
        load_teacher(teacher_folder(teacher)),
        DigitsJudge(),
        GUIDANCE_SCALES[teacher],
    )
    common: dict[str, Any] = {
        "guidance_scale": scale,
        "num_images": NUM_IMAGES,
        "seed": REPORT_SEED,
        "progress": progress,
    }
    rows = [judge_teacher(pipe, judge, num_steps=n, **common).row for n in TEACHER_STEPS]
    return [*rows, judge_stock_teacher(pipe, judge, num_steps=min(TEACHER_STEPS), **common).row]


def main() -> int:
    """Measure and write the shipped file."""
    with Progress() as progress:
        rows = {
            name: [r.to_dict() for r in measure_rows(name, progress)] for name in GUIDANCE_SCALES
        }
    data = {"weights_sha256": weights_checksum(), "guidance_scales": GUIDANCE_SCALES, "rows": rows}
    FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
