"""manifest.json of an export folder: what its graphs take and give, and what was measured of it.

Written by fewstep.export, read by every host of the folder. No onnx, no onnxruntime.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fewstep import strict_json
from fewstep.errors import ExportFolderError

FORMAT = "fewstep.export"
MAJOR = 1
FILE = "manifest.json"

ElementType = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
Precision = Literal["fp32", "fp16", "bf16", "int8-dynamic", "int8-static", "int4", "fp8", "nvfp4"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One input or output of a graph.

    Attributes:
        name: In the graph.
        dtype: Its element type.
        dims: One string per axis: a number, a symbol ("batch_size") or "symbol op number"
            ("latent_height * 8"). A scalar has none.
    """

    name: str
    dtype: ElementType
    dims: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """One ONNX file.

    Attributes:
        file: Relative to the folder, with forward slashes.
        inputs: In the graph's order.
        outputs: In the graph's order, which is part of the contract.
        opset: Of the ai.onnx domain.
        precision: Of its weights.
        multiples: Symbol -> what its value must be divisible by.
    """

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    opset: int
    precision: Precision
    multiples: dict[str, int] = field(default_factory=dict)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Free symbols of the inputs, each once, in order of appearance."""
        names = [dim for tensor in self.inputs for dim in tensor.dims if not dim.isdigit()]
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file as it was written: its size in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One figure of the parity gate.

    Attributes:
        what: "transformer", "trajectory", "image", ...
        where: Shapes and settings, for people.
        value: The figure, a finite number: JSON has no other.
        unit: "max error", "relative error", "dB", "ratio of time", ...
        limit: What it was held against; None where it is only reported.
    """

    what: str
    where: str
    value: float
    unit: str
    limit: float | None = None

    def __post_init__(self) -> None:
        strict_json.check(self, error=ExportFolderError, where="measured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All of manifest.json.

    Attributes:
        format: "fewstep.export/1".
        family: How prompts are encoded and latents shaped: "sd15", "sdxl", "sd3", "flux", ...
        pipeline: Class of the stock pipeline, also in model_index.json.
        precision: Of the denoiser.
        graphs: Component name -> its graph; "fused" is the whole pipeline.
        experts: The graph that serves each of the recipe's experts; empty without experts.
        settings: What the family's host needs beyond the graphs (scaling factors, text lengths).
        texts: What the family's host puts around prompts ("before", "after").
        files: Every other file of the folder.
        measured: What the parity gate found.
        verified: Whether the gate passed; False only where it was overruled.
        versions: Package -> version it was made with.
        licence: Of the weights, where the base says.
        created: UTC, ISO 8601.
    """

    format: str
    family: str
    pipeline: str
    precision: Precision
    graphs: dict[str, Graph]
    experts: tuple[str, ...] = ()
    settings: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    verified: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    licence: str | None = None
    created: str = ""

    def __post_init__(self) -> None:
        check_format(self.format)
        strict_json.check(self, error=ExportFolderError, where="manifest")

    @property
    def makes_clips(self) -> bool:
        """Whether its model makes clips and not single pictures."""
        return "frames_per_second" in self.settings

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"


def check_format(stated: object) -> None:
    """Refuse another format, and a newer major of this one.

    Raises:
        ExportFolderError: It is not one this release reads.
    """
    name, _, major = str(stated).partition("/")
    if name != FORMAT or not major.isdigit():
        raise ExportFolderError(
            f"manifest.json says format {strict_json.shown(stated)}, not {FORMAT}/{MAJOR}; is this "
            "a folder of `fewstep export`?"
        )
    if int(major) != MAJOR:
        raise ExportFolderError(
            f"this folder was written in format {FORMAT}/{major}, and this release reads "
            f"{FORMAT}/{MAJOR}; export it again with this release, or use the one that made it"
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export folder.

    Raises:
        ExportFolderError: There is none, it is damaged, or of another format.
    """
    file = folder / FILE
    if not file.is_file():
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise ExportFolderError(
            f"{folder} {what}; pass the folder that `fewstep export onnx --out` made"
        )
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportFolderError(f"{file} is not JSON ({error}); export again") from None
    if isinstance(data, Mapping):  # a newer format may have other keys: its version comes first
        check_format(data.get("format"))
    return strict_json.read(Manifest, data, error=ExportFolderError, where="manifest")
