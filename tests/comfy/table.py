"""The parity table of docs/comfyui.md, measured in a real ComfyUI.

    COMFYUI_PATH=/path/to/ComfyUI python tests/comfy/table.py           print it
    COMFYUI_PATH=/path/to/ComfyUI python tests/comfy/table.py --write   into the page

`make comfy` runs it after the tests.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import torch  # noqa: E402

from tests.comfy.contrast import HABITS, contrast  # noqa: E402
from tests.comfy.harness import Comfy, boot  # noqa: E402
from tests.comfy.parity import (  # noqa: E402
    CASES,
    PARITY,
    SAMPLERS,
    has_stock_pipeline,
    parity_error,
)
from tests.comfy.tiny_models import ALL_MODELS, TinyModel  # noqa: E402

PAGE = ROOT / "docs" / "comfyui.md"
START, END = "<!-- parity -->", "<!-- /parity -->"
TITLES = {"sd3": "SD3", "sd15": "SD1.5", "sdxl": "SDXL", "wan": "Wan 2.1", "pixart": "PixArt"}
DAGGER = "\N{DAGGER}"
"""Behind an error against `references.in_a_loop`."""


def main(argv: Sequence[str]) -> int:
    """Measure, print, write if asked; 1 if a cell misses the bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/comfyui.md")
    options = parser.parse_args(argv)
    if "COMFYUI_PATH" not in os.environ:
        parser.error("set COMFYUI_PATH to a ComfyUI folder")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        comfy = boot(Path(os.environ["COMFYUI_PATH"]).resolve(), Path(folder))
        logging.disable(logging.INFO)
        errors = measured(comfy)
        text = "\n\n".join((parity_table(errors), contrast_table(comfy), versions()))
    sys.stdout.write(f"{text}\n")
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(START)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return int(max(errors.values()) > PARITY)


def measured(comfy: Comfy) -> dict[tuple[TinyModel, str, str], float]:
    """Every cell."""
    return {
        (model, sampler, case): parity_error(comfy, model, sampler, case)
        for model in ALL_MODELS
        for sampler in SAMPLERS
        for case in CASES
    }


def parity_table(errors: dict[tuple[TinyModel, str, str], float]) -> str:
    """Families and samplers down, cases across."""
    rows = [["base", "sampler", *CASES]]
    for model in ALL_MODELS:
        for sampler in SAMPLERS:
            cells = [_cell(errors[model, sampler, case], model, case) for case in CASES]
            rows.append([TITLES[model.name], sampler, *cells])
    return (
        f"Few-Step nodes in ComfyUI {comfyui_version()} against FewStepPipeline in diffusers: same "
        "adapter, same seed,\nrelative L2 error of the latents (the tests demand "
        f"{PARITY:.0e}).\n\n"
        f"{as_markdown(rows)}\n\n"
        f"{DAGGER} diffusers has no such pipeline: against fewstep's scheduler stepping the stock "
        "network in a loop that\nbegins and blends as the stock pipelines of the other bases do."
    )


def contrast_table(comfy: Comfy) -> str:
    """One row per habit."""
    rows = [["base", "trained for", "ComfyUI's own nodes, as usually set", "network told", "error"]]
    for habit in HABITS:
        found = contrast(comfy, habit)
        wanted = f"{habit.sampler} {_shown(found.wanted)}"
        told = "the same" if _is_same(found.told, found.wanted) else _shown(found.told)
        title = TITLES[habit.model.name]
        rows.append([title, wanted, habit.title, told, f"{found.error:.0e}"])
    return (
        "For contrast, four steps of KSampler, cfg 1 unless said, against the same pictures. "
        "Random networks hardly\nlisten to the timestep, so an error says that the picture is "
        f"another one, not how bad it is.\n\n{as_markdown(rows)}"
    )


def comfyui_version() -> str:
    """Of the ComfyUI that was booted."""
    from comfyui_version import __version__  # pyright: ignore[reportMissingImports]

    return __version__


def versions() -> str:
    """What it was measured with."""
    of_torch = torch.__version__.partition("+")[0]
    return (
        "Measured by `tests/comfy/table.py` (`make comfy` runs it) with ComfyUI "
        f"{comfyui_version()}, diffusers {diffusers.__version__}, torch {of_torch}: tiny random "
        "models, float32, CPU."
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table; the first is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(error: float, model: TinyModel, case: str) -> str:
    mark = "" if has_stock_pipeline(model, case) else DAGGER
    return f"{error:.0e}{mark}"


def _shown(timesteps: Sequence[float]) -> str:
    return ", ".join(f"{timestep:.0f}" for timestep in timesteps)


def _is_same(told: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(told) == len(wanted) and all(
        abs(a - b) < 0.01 for a, b in zip(told, wanted, strict=True)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
