"""The table of docs/adapters.md: every family in every format, in diffusers and in ComfyUI.

    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/adapter_formats.py           print it
    COMFYUI_PATH=/path/to/ComfyUI python benchmarks/adapter_formats.py --write   into the page

COMFYUI_PYTHON names the interpreter that can import ComfyUI, where it is not this one. Models are
tiny and random (tests/conversion_families.py); every Linear and convolution carries a LoRA, ranks
2, 3 and 4 in turn, alpha half the rank.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402

from fewstep.adapters.conversion.writing import Format  # noqa: E402
from fewstep.errors import AdapterError  # noqa: E402
from tests.conversion_checks import (  # noqa: E402
    adapted,
    comfyui_job,
    in_diffusers,
    merged,
    read,
    round_trip_error,
    run_comfyui,
    write,
    write_diffusers,
)
from tests.conversion_families import ALL, ConversionFamily  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"
START, END = "<!-- table: benchmarks/adapter_formats.py -->", "<!-- end of table -->"
FORMATS: tuple[Format, ...] = ("diffusers", "comfyui", "kohya")
COLUMNS = (
    *("family", "format", "fewstep in diffusers", "output error"),
    *("diffusers alone", "ComfyUI key map", "delta error in ComfyUI", "round trip error"),
)


def main(argv: Sequence[str]) -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/adapters.md")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    table = as_markdown(measure())
    print(table)
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(START)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")


def measure() -> list[dict[str, str]]:
    """One row per family and format."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [
            comfyui_job(family, folder, flavour)
            for family in ALL
            if family.comfy_class
            for flavour in FORMATS[1:]
        ]
        in_comfyui = {result["name"]: result for result in run_comfyui(jobs, folder)}
        for family in ALL:
            for flavour in FORMATS:
                rows.append(_row(family, flavour, folder, in_comfyui))
    return rows


def _row(
    family: ConversionFamily, flavour: Format, folder: Path, in_comfyui: dict[str, Any]
) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "-") | {"family": family.name, "format": flavour}
    tensors, alphas = family.lora()
    source = write_diffusers(folder / "source.safetensors", family, tensors, alphas)
    try:
        file = write(folder / "file.safetensors", family, read(source, family), flavour)
    except AdapterError:
        return row | {"fewstep in diffusers": "no such model in ComfyUI 0.8.0"}
    wanted = family.output(merged(family, tensors, alphas))
    back = write(folder / "back.safetensors", family, read(file, family), "diffusers")
    model = in_diffusers(back, family)
    row["fewstep in diffusers"] = f"{len(adapted(model))} of {len(alphas)}"
    row["output error"] = _relative(family.output(model), wanted)
    row["diffusers alone"] = _alone(family, file, len(alphas), wanted)
    row["round trip error"] = f"{round_trip_error(family, folder, flavour):g}"
    result = in_comfyui.get(f"{family.name}-{flavour}")
    if result:
        row["ComfyUI key map"] = f"{result['taken']} of {result['tensors']}"
        row["delta error in ComfyUI"] = f"{result['error']:g}"
    return row


def _alone(family: ConversionFamily, file: Path, modules: int, wanted: Any) -> str:
    """The same file in diffusers' own loader, without fewstep."""
    try:
        model = in_diffusers(file, family)
    except Exception as error:  # whatever its converters trip over
        return f"refused ({type(error).__name__})"
    found = len(adapted(model))
    return f"{found} of {modules}, {_relative(family.output(model), wanted)}" if found else "0"


def _relative(output: Any, wanted: Any) -> str:
    error = float((output - wanted).abs().max() / wanted.abs().max())
    return f"{error:.0e}"


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """The rows as a table."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    lines += [f"| {' | '.join(row[column] for column in COLUMNS)} |" for row in rows]
    lines.append(
        f"\nMeasured with diffusers {diffusers.__version__} and ComfyUI 0.8.0, float32, CPU."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
