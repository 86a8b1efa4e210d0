"""What holds for every test."""

import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

import huggingface_hub
import pytest

from tests.made_once import VARIABLE

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # before torch is imported: each process has its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


def pytest_configure(config: pytest.Config) -> None:
    """Folders that are made once are of this run, and go with it."""
    if VARIABLE not in os.environ:  # else a process of the run, which has its parent's
        os.environ[VARIABLE] = mkdtemp(prefix="fewstep-test-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(VARIABLE), ignore_errors=True))


@pytest.fixture(autouse=True)
def own_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of pickled adapters go to the test's folder, not to the user's cache."""
    folder = tmp_path / "assets"
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *_, **__: folder)
    return folder
