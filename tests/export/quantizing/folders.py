"""Folders that the tests quantize: the digits SD3 export, copied where it is changed."""

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from fewstep.export.checking.reference import onnx_loader
from fewstep.export.quantizing.trajectories import record
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.session import Feeds
from tests.digits_exports import exported

PROMPTS = ("a handwritten seven", "a handwritten two", "a handwritten one")


@cache
def source() -> ExportFolder:
    """The float folder, only read."""
    return ExportFolder.open(exported("sd3").folder)


@cache
def feeds() -> list[Feeds]:
    """Inputs of its transformer along three trajectories."""
    return record(source(), onnx_loader(source(), 1), PROMPTS)["transformer"]


@cache
def prompts_file() -> Path:
    """The prompts as a text file."""
    file = Path(mkdtemp(prefix="fewstep-test-")) / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return file


def copied(to: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(source().root, to)
    return to


def relative(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(np.linalg.norm(wanted - found) / np.linalg.norm(wanted))
