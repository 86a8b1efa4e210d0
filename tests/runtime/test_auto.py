"""The engine that "auto" remembers: measured again where that is damaged or out of date."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from fewstep.runtime import providers
from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.digits_exports import exported

pytest.importorskip("openvino")  # with one engine there is nothing to choose

DAMAGES = {
    "empty": b"",
    "a list": b"[]",
    "zeros": b"\0\0",
    "no text": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "a number": b'{"provider": 3}',
    "cut": b'{"provider": "cp',
    "another engine": b'{"provider": "toaster"}',
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(providers, "ENOUGH_S", 0.0)


def start() -> str:
    return FewStepRuntime.load(exported("sd3").folder, provider="auto", threads=1).provider


def choices(root: Path) -> list[Path]:
    return sorted((root / "cache" / "providers").glob("*.json"))


def test_a_damaged_choice_is_measured_again(tmp_path: Path) -> None:
    start()
    (kept,) = choices(tmp_path)
    for damage in DAMAGES.values():
        kept.write_bytes(damage)
        chosen = start()
        assert json.loads(kept.read_bytes())["provider"] == chosen
        assert choices(tmp_path) == [kept]


def test_an_upgrade_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    for package in ("onnxruntime", "openvino"):
        with monkeypatch.context() as upgraded:
            upgraded.setattr(providers, "version", lambda name, p=package: newer(name, p))
            start()
    monkeypatch.setattr(providers, "__version__", "99")
    for _ in range(2):
        start()
        assert len(choices(tmp_path)) == 4


def newer(name: str, upgraded: str) -> str:
    return "99" if name == upgraded else version(name)
