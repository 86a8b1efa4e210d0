"""Importing fewstep is light, public names resolve, and extras say what they bring."""

import subprocess
import sys

import pytest

import fewstep
from fewstep.errors import MissingExtraError
from fewstep.extras import EXTRA_OF, missing_extra
from tests.imported_packages import PROJECT, ROOT, brought_by, distributions_of, imported_packages

DISTRIBUTIONS = {
    "modelopt": "nvidia-modelopt",
    "onnx_ir": "onnx-ir",
    "onnxruntime": "onnxruntime",
    "prometheus_client": "prometheus-client",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "cuda": "cuda-bindings",
    "tensorrt": "tensorrt-cu13",
}
"""Import names that differ from the name on the package index (or share its start)."""

EXTRAS_OF_THEIR_OWN = {"openvino", "modelopt", "tensorrt"}
"""Engines and quantizers that `fewstep.export` uses only where the user asks for them."""
HEAVY_AFTER_IMPORT = """
import sys
import fewstep
print(sorted({"torch", "diffusers", "transformers", "numpy", "tyro"} & set(sys.modules)))
"""
BLOCKED_TORCH = """
import sys
sys.modules["torch"] = None
import fewstep
try:
    fewstep.FewStepPipeline
except fewstep.FewstepError as error:
    print(type(error).__name__, error)
"""


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_is_light() -> None:
    assert python(HEAVY_AFTER_IMPORT).strip() == "[]"


@pytest.mark.parametrize("name", fewstep.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(fewstep, name)
    assert value is not None
    assert name in dir(fewstep)


def test_lazy_names_are_the_public_ones() -> None:
    assert sorted([*fewstep.HOMES, "__version__"]) == sorted(fewstep.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'FewStepPipline'"):
        getattr(fewstep, "FewStepPipline")  # noqa: B009


def test_missing_torch_names_the_extra() -> None:
    said = python(BLOCKED_TORCH)
    assert said.startswith("MissingExtraError torch is not installed; run: pip install")
    assert "fewstep[torch]" in said


def test_missing_package_of_no_extra_is_not_translated() -> None:
    assert missing_extra(ModuleNotFoundError("x", name="somebody_elses")) is None
    found = missing_extra(ModuleNotFoundError("x", name="sklearn.datasets"))
    assert isinstance(found, MissingExtraError)


@pytest.mark.parametrize("package", EXTRA_OF)
def test_the_named_extra_really_brings_the_package(package: str) -> None:
    requirements = PROJECT["optional-dependencies"][EXTRA_OF[package]]
    name = DISTRIBUTIONS.get(package, package)
    assert any(r.startswith((f"{name}>", f"{name}=", f"{name}[")) for r in requirements)


def test_the_documented_extras_bring_all_that_export_imports() -> None:
    reached = imported_packages("fewstep.export.__main__")
    assert {"torch", "onnx", "onnxruntime", "skimage", "rich"} <= set(reached)
    brought = brought_by(["export", "runtime"])
    missing = {
        package: sorted(modules)
        for package, modules in reached.items()
        if EXTRA_OF.get(package) not in EXTRAS_OF_THEIR_OWN
        and not distributions_of(package) & brought
    }
    assert missing == {}


def test_the_package_is_marked_as_typed() -> None:
    assert (ROOT / "fewstep" / "py.typed").exists()


def test_comfy_nodes_import_without_comfy() -> None:
    code = (
        "import sys, fewstep.comfy_nodes as n;"
        "print([m for m in ('comfy', 'torch') if m in sys.modules], n.__all__)"
    )
    assert python(code) == "[] ['WEB_DIRECTORY', 'comfy_entrypoint']\n"


def test_export_lists_its_commands() -> None:
    command = [sys.executable, "-m", "fewstep.export"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"onnx", "check", "quantize", "tensorrt", "triton"} <= set(done.stdout.split())
