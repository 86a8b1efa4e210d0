"""What holds for every test."""

from pathlib import Path

import huggingface_hub
import pytest


@pytest.fixture(autouse=True)
def own_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of pickled adapters go to the test's folder, not to the user's cache."""
    folder = tmp_path / "assets"
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *_, **__: folder)
    return folder
