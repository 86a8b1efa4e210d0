"""The folder of engines: one folder per key, written under a lock, complete or absent.

DIR/tensorrt/transformer-sm90-0123456789abcdef/engine.plan
DIR/tensorrt/transformer-sm90-0123456789abcdef/engine.json    written last
DIR/tensorrt/timing/tensorrt-11.4.0.106-sm90.cache            measured kernel times, shared
"""

import hashlib
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import ExportFolderError, RuntimeSettingError
from fewstep.runtime.export_folder import file_sha256
from fewstep.runtime.tensorrt.identity import (
    Engine,
    EngineIdentity,
    Installation,
    check_fits,
    read_engine,
)

logger = logging.getLogger(__name__)

PLAN = "engine.plan"
SIDECAR = "engine.json"
FOLDER = "tensorrt"
"""Inside an export folder."""


@dataclass(frozen=True, slots=True)
class EngineCache:
    """Engines of one export folder.

    Attributes:
        root: `DIR/tensorrt` unless the user names another place.
    """

    root: Path

    def folder(self, component: str, identity: EngineIdentity) -> Path:
        """Where an engine lies or would lie."""
        return self.root / f"{component}-{identity.sm}-{identity.key[:16]}"

    def timing_file(self, tensorrt: str, sm: str) -> Path:
        """Where kernel timings lie, shared by all engines of a release and architecture."""
        return self.root / "timing" / f"tensorrt-{tensorrt}-{sm}.cache"

    def stored(self, component: str, identity: EngineIdentity) -> Engine | None:
        """The sidecar of a complete engine with exactly this identity, or None.

        Sidecar and plan are both read: what is damaged is no engine, so it is built again.
        """
        folder = self.folder(component, identity)
        if not (folder / SIDECAR).is_file():
            return None
        engine = readable_engine(folder / SIDECAR)
        if engine is None or engine.identity != identity:
            return None
        return engine if self._is_whole(engine) else None

    def engines(self, component: str) -> list[Engine]:
        """All engines of a component with a readable sidecar, newest first."""
        files = self.root.glob(f"{component}-sm*/{SIDECAR}")
        found = [readable_engine(file) for file in files]
        mine = [engine for engine in found if engine is not None and engine.component == component]
        return sorted(mine, key=lambda engine: engine.created, reverse=True)

    def publish(self, engine: Engine, plan: bytes) -> Path:
        """Write plan and sidecar so that a reader sees both or none.

        Returns:
            The plan's path.
        """
        folder = self.folder(engine.component, engine.identity)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SIDECAR).unlink(missing_ok=True)  # a plan without sidecar does not exist
        write_whole(folder / PLAN, plan)
        write_whole(folder / SIDECAR, engine.to_json().encode())
        return folder / PLAN

    def plan(self, engine: Engine) -> bytes:
        """The plan's bytes, compared with what was written.

        Raises:
            ExportFolderError: It is missing or was changed.
        """
        file = self.folder(engine.component, engine.identity) / PLAN
        if not file.is_file():
            raise ExportFolderError(f"{file} is missing beside its engine.json; build it again")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != engine.plan_sha256:
            raise ExportFolderError(
                f"{file} has {len(data)} bytes that are not the ones its engine.json recorded "
                f"({engine.plan_bytes} bytes); build it again"
            )
        return data

    def _is_whole(self, engine: Engine) -> bool:
        file = self.folder(engine.component, engine.identity) / PLAN
        if not file.is_file() or file.stat().st_size != engine.plan_bytes:
            return False
        return file_sha256(file) == engine.plan_sha256


def readable_engine(file: Path) -> Engine | None:
    """A sidecar, or None where it is damaged: it must not stand in the way of other engines."""
    try:
        return read_engine(file)
    except ExportFolderError as error:
        logger.warning("an engine is passed over: %s", error)
        return None


def fitting_engine(
    cache: EngineCache,
    component: str,
    here: Installation,
    *,
    onnx_sha256: str,
    data_sha256: str,
) -> Engine:
    """The newest engine of a component that this machine can load.

    Args:
        cache: Engines of the export folder.
        component: Of the manifest.
        here: This machine.
        onnx_sha256: Of the folder's present model.onnx.
        data_sha256: Of its model.onnx_data; empty where there is none. Two adapters give one
            model.onnx and differ here.

    Raises:
        RuntimeSettingError: There is none; where another machine's lies there, both are named.
    """
    engines = cache.engines(component)
    if not engines:
        raise RuntimeSettingError(
            f"{cache.root} holds no engine of {component}; build one: fewstep export tensorrt DIR "
            f"--target {here.sm} --build"
        )
    wanted = (onnx_sha256, data_sha256)
    current = [e for e in engines if (e.identity.onnx_sha256, e.identity.data_sha256) == wanted]
    if not current:
        raise RuntimeSettingError(
            f"the engine of {component} was built from another model.onnx or other weights than "
            f"the folder has; build it again: fewstep export tensorrt DIR --target {here.sm} "
            "--build"
        )
    for engine in current:
        if engine.identity.installation == here:
            return engine
    check_fits(current[0], here)
    raise AssertionError("check_fits compares what the loop compared")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of one key: a second process waits and then finds the finished engine."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder.with_name(f".{folder.name}.lock"))):
        yield


def write_whole(file: Path, data: bytes) -> None:
    """Write under a name nobody else has, flush to disk, rename.

    Threads of one process and containers on one shared folder may write the same file at once: the
    last one stays, whole.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
