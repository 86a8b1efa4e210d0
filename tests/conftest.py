"""What holds for every test."""

import os
from pathlib import Path

import huggingface_hub
import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # before torch is imported: each process has its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


@pytest.fixture(autouse=True)
def own_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of pickled adapters go to the test's folder, not to the user's cache."""
    folder = tmp_path / "assets"
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *_, **__: folder)
    return folder
