"""What an engine is: everything that decides whether a plan file may be loaded, and its key.

A plan is tied to the exact TensorRT release, the GPU architecture and the system, and TensorRT has
no call that says so before loading. So all of it is written beside the plan and compared first.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep import strict_json
from fewstep.errors import ExportFolderError, RuntimeSettingError
from fewstep.runtime.manifest import Tensor

FORMAT = "fewstep.engine/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputRange:
    """Smallest, usual and largest shape of one input; the usual one is what is tuned for.

    Attributes:
        name: Of the input.
        min: Smallest size per axis.
        opt: Size per axis that kernels are chosen for.
        max: Largest size per axis.
    """

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape lies inside, axis by axis."""
        if len(shape) != len(self.min):
            return False
        return all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Ranges of all inputs that may be used together."""

    ranges: tuple[InputRange, ...]

    def holds(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether every input's shape lies inside."""
        return all(entry.holds(shapes[entry.name]) for entry in self.ranges)


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """What an engine would meet here."""

    tensorrt: str
    cuda: int
    sm: str
    system: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineIdentity:
    """All that changes the plan; two equal identities may share one.

    Attributes:
        onnx_sha256: Of model.onnx.
        data_sha256: Of model.onnx_data; empty where there is none.
        adapter_sha256: Of the merged adapter file's content; empty where there is none.
        tensorrt: Full version, "11.4.0.106".
        cuda: Major version.
        sm: GPU architecture, "sm90".
        system: "linux-x86_64", ...
        flags: Names of TensorRT's BuilderFlag, sorted.
        profiles: In the engine's order.
        optimization_level: 0 to 5.
        workspace_bytes: Limit of scratch memory while building and running.
        refittable: Weights that may be replaced later, sorted; needs flag REFIT_INDIVIDUAL.
    """

    onnx_sha256: str
    data_sha256: str = ""
    adapter_sha256: str = ""
    tensorrt: str
    cuda: int
    sm: str
    system: str
    flags: tuple[str, ...] = ()
    profiles: tuple[Profile, ...]
    optimization_level: int
    workspace_bytes: int
    refittable: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """SHA-256 of all fields, in hexadecimal."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def installation(self) -> Installation:
        """Where the plan may be loaded."""
        return Installation(tensorrt=self.tensorrt, cuda=self.cuda, sm=self.sm, system=self.system)


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """engine.json, beside the plan.

    Attributes:
        format: "fewstep.engine/1".
        component: Of the export folder's manifest.
        identity: What the plan was made of and for.
        inputs: In the graph's order, with the manifest's dims.
        outputs: In the graph's order.
        plan_bytes: Size of engine.plan.
        plan_sha256: Of engine.plan.
        seconds: Build time.
        log_sha256: Of TensorRT's messages during the build.
        needs_weights: The plan was stripped: it must be refitted from the ONNX file when loaded.
        created: UTC, ISO 8601.
    """

    format: str
    component: str
    identity: EngineIdentity
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    plan_bytes: int
    plan_sha256: str
    seconds: float
    log_sha256: str = ""
    needs_weights: bool = False
    created: str = ""

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def read_engine(file: Path) -> Engine:
    """The sidecar of a plan.

    Raises:
        ExportFolderError: It is missing, damaged or of another format.
    """
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportFolderError(
            f"{file} cannot be read ({error}); build the engine again"
        ) from None
    stated = data.get("format") if isinstance(data, Mapping) else None
    if stated != FORMAT:
        raise ExportFolderError(
            f"{file} says format {strict_json.shown(stated)}, and this release reads {FORMAT}; "
            "build the engine again"
        )
    return strict_json.read(Engine, data, error=ExportFolderError, where="engine")


def check_fits(engine: Engine, here: Installation) -> None:
    """Refuse a plan that TensorRT would reject or, worse, run wrong.

    Raises:
        RuntimeSettingError: Built for something else; the message names both.
    """
    built = engine.identity
    name = f"the engine of {engine.component}"
    again = f"build it here: fewstep export tensorrt DIR --target {here.sm} --build"
    if built.tensorrt != here.tensorrt:
        raise RuntimeSettingError(
            f"{name} was built with TensorRT {built.tensorrt} and TensorRT {here.tensorrt} is "
            f"installed; {again}, or install TensorRT {built.tensorrt}"
        )
    if built.sm != here.sm:
        raise RuntimeSettingError(
            f"{name} was built for {built.sm} and this GPU is {here.sm}; {again}"
        )
    if built.system != here.system:
        raise RuntimeSettingError(
            f"{name} was built on {built.system} and this is {here.system}; {again}"
        )
    if built.cuda != here.cuda:
        raise RuntimeSettingError(
            f"{name} was built with CUDA {built.cuda} and CUDA {here.cuda} is installed; {again}"
        )


def this_system() -> str:
    """Operating system and processor: "linux-x86_64"."""
    return f"{platform.system()}-{platform.machine()}".lower()
