"""Every name of TensorRT and of CUDA's bindings that is used exists in the real ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export.tensorrt.fake_cuda import CUDA_VERSIONS
from tests.export.tensorrt.fake_library import (
    TENSORRT_VERSIONS,
    Recorder,
    fake_tensorrt,
    surface,
)

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(
    [*(ROOT / "export/tensorrt").glob("*.py"), *(ROOT / "fewstep/runtime/tensorrt").glob("*.py")]
)
OBJECTS = {  # what a variable holds, by the name it always has in these files
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": ("OnnxParser", "OnnxParserRefitter"),
    "config": "IBuilderConfig",
    "engine": "ICudaEngine",
    "trt_engine": "ICudaEngine",
    "runtime": "Runtime",
    "refitter": "Refitter",
    "made": "IOptimizationProfile",
}

CALLS = {"runtime": "cudart", "library": "trt"}
"""Functions that give a module."""


def attributes(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Every chain of attributes: ("trt", ["BuilderFlag", "REFIT"])."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Call):  # runtime().cudaMalloc
            node = node.func
            if isinstance(node, ast.Name) and chain and node.id in CALLS:
                yield CALLS[node.id], chain
        elif isinstance(node, ast.Name) and chain:
            yield node.id, chain


def has(names: dict, chain: list[str]) -> bool:
    """Whether a class has a member of a member."""
    if chain[-1] in ("__version__", "__init__"):  # every module and class has these
        chain = chain[:-1]
        if not chain:
            return True
    kind = names["classes"].get(chain[0])
    if kind is None:
        return chain[0] in (*names["functions"], *names["values"])
    if len(chain) == 1:
        return True
    inner = kind["classes"].get(chain[1])
    if inner is not None:
        return len(chain) == 2 or chain[2] in inner["enum"]
    return chain[1] in (*kind["enum"], *kind["methods"], *kind["properties"])


def uses(name: str) -> set[tuple[str, ...]]:
    """Chains that start at a variable, over all files."""
    return {tuple(chain) for file in FILES for root, chain in attributes(file) if root == name}


@pytest.mark.parametrize("version", TENSORRT_VERSIONS)
def test_every_name_of_the_module_exists(version: str) -> None:
    names = surface("tensorrt", version)
    used = uses("trt")
    assert len(used) > 15  # the walk finds them
    assert {chain for chain in used if not has(names, list(chain))} == set()


@pytest.mark.parametrize("version", TENSORRT_VERSIONS)
def test_every_member_of_its_objects_exists(version: str) -> None:
    names = surface("tensorrt", version)
    in_builder = [ROOT / "export/tensorrt/build.py", ROOT / "fewstep/runtime/tensorrt/engine.py"]
    for file in in_builder:
        for root, chain in attributes(file):
            kinds = OBJECTS.get(root, ())
            for kind in (kinds,) if isinstance(kinds, str) else kinds:
                known = names["classes"][kind]
                if chain[0] in (*known["methods"], *known["properties"]):
                    break
            else:
                assert not kinds, f"{root}.{chain[0]} in {file.name} is not in {version}"


@pytest.mark.parametrize("version", CUDA_VERSIONS)
def test_every_name_of_cuda_exists(version: str) -> None:
    names = surface("cuda-runtime", version)
    used = uses("cudart")
    assert len(used) > 15
    assert {chain for chain in used if not has(names, list(chain))} == set()


def test_what_tensorrt_11_removed_is_seen() -> None:
    old, new = surface("tensorrt", "10.16.1.11"), surface("tensorrt", "11.4.0.106")
    for gone in (["BuilderFlag", "FP16"], ["ICudaEngine", "device_memory_size"], ["IAlgorithm"]):
        assert has(old, gone)
        assert not has(new, gone)
    assert not has(new, ["BuilderFlag", "NOT_A_FLAG"])
    assert has(new, ["ILogger", "Severity", "ERROR"])


def test_the_stand_in_has_no_name_of_its_own() -> None:
    for version in TENSORRT_VERSIONS:
        trt = fake_tensorrt(version, {}, Recorder())
        is_old = version.startswith("10.")
        assert hasattr(trt.BuilderFlag, "FP16") == is_old
        assert hasattr(trt, "IAlgorithm") == is_old
        with pytest.raises(AttributeError):
            trt.IBuilderConfig().max_workspace_size = 1
        with pytest.raises(AssertionError, match="does not know what it does"):
            trt.Builder(None).reset()
