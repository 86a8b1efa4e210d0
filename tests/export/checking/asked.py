"""Folders that are checked: the digits SD3 export, copied and changed."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
from rich.console import Console

from fewstep.export.checking import fused_graph, gate, speed
from fewstep.export.checking.command import CheckOptions, run
from fewstep.export.checking.findings import write_figures
from fewstep.export.checking.speed import Times
from fewstep.runtime.manifest import read_manifest
from tests.export.quantizing.folders import copied, prompts_file

WEIGHT = "transformer_blocks.0.ff.net.2.weight::T"


def told(folder: Path, **changes: object) -> str:
    """What the command prints; few repeats, since nothing here asks for exact times."""
    stream = io.StringIO()
    known: dict[str, object] = {"prompts": prompts_file(), "threads": 1}
    options = CheckOptions(folder=folder, **(known | changes))  # pyright: ignore[reportArgumentType]
    with patch.object(speed, "BUDGET_S", 0.0):
        run(options, Console(file=stream, width=300))
    return stream.getvalue()


@contextmanager
def timed(ratio: float) -> Iterator[None]:
    """A machine on which every comparison of times gives this ratio."""

    def compare(what: str, where: str, *calls: Any) -> Times:
        assert len(calls) == 2
        return Times(what, where, 1.0, ratio, ratio, ratio, ratio, 7)

    with (
        patch.object(gate, "compare_times", compare),
        patch.object(fused_graph, "compare_times", compare),
    ):
        yield


def with_weight(folder: Path, change: float, graph: str = "transformer") -> None:
    """Multiply one weight, as somebody would who knew what he did."""
    file = folder / graph / "model.onnx"
    model = ir.load(file)
    (held,) = (v for n, v in model.graph.initializers.items() if n.endswith(WEIGHT))
    assert held.const_value is not None
    held.const_value = ir.tensor(held.const_value.numpy() * np.float32(change), name=held.name)
    ir.save(model, file, external_data="model.onnx_data", size_threshold_bytes=1024)


def known_as(folder: Path, *, verified: bool) -> Path:
    """A copy whose manifest says so, on whatever machine it was made."""
    made = copied(folder)
    write_figures(made, replace(read_manifest(made), verified=verified))
    return made
