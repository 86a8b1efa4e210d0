"""Fixtures of the tests that run in a real ComfyUI, and why they are skipped without one."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.comfy.harness import Comfy, boot
from tests.comfy.server import Server, serving

HERE = Path(__file__).parent
NEEDED = ("torch", "torchsde", "aiohttp", "av", "sqlalchemy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder, and skip it where ComfyUI cannot run."""
    reason = why_not()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.comfy)
        item.add_marker(pytest.mark.filterwarnings("default"))  # ComfyUI's warnings are not ours
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_not() -> str | None:
    """What is missing to run these tests, as a sentence; None if nothing is."""
    named = os.environ.get("COMFYUI_PATH")
    if not named:
        return "set COMFYUI_PATH to a ComfyUI folder (make comfy COMFYUI_PATH=...)"
    if not (Path(named) / "comfy" / "sd.py").is_file():
        return f"COMFYUI_PATH={named} is not a ComfyUI folder: it has no comfy/sd.py"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"ComfyUI's requirements are not installed here ({', '.join(missing)}); run make comfy"
        )
    return None


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Comfy:
    """ComfyUI in this process, with our pack and the test kit."""
    return boot(Path(os.environ["COMFYUI_PATH"]).resolve(), tmp_path_factory.mktemp("comfy"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI in a process of its own, over HTTP, with the installed pack and the test kit."""
    folder = tmp_path_factory.mktemp("server")
    with serving(Path(os.environ["COMFYUI_PATH"]).resolve(), folder) as running:
        yield running
