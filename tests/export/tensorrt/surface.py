"""`make tensorrt-surface`: names of TensorRT's Python API, from NVIDIA's own binding wheels.

The wheels link libnvinfer, which needs a GPU's driver to be of use and weighs gigabytes. Only ten C
symbols of it are looked up when the module loads, so three empty libraries are enough to import the
bindings and list what is in them. Nothing of the wheels is kept: only names, one JSON per version.

python tests/export/tensorrt/surface.py
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / "surfaces"
VERSIONS = {  # version -> package: the oldest release used, and the newest of both majors
    "10.12.0.36": "tensorrt_cu12_bindings",
    "10.16.1.11": "tensorrt_cu13_bindings",
    "11.4.0.106": "tensorrt_cu13_bindings",
}
CUDA_VERSIONS = ("13.5.0", "12.9.10")
SYMBOLS = """
void *createInferBuilder_INTERNAL(void *a, int b) { return 0; }
void *createInferRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
void *createInferRuntime_INTERNAL(void *a, int b) { return 0; }
void *getBuilderPluginRegistry(int a) { return 0; }
void *getPluginRegistry(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void *a, void *b, int c) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *a, const char *b) { return 1; }
"""
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
DUMP = """
import importlib, json, sys

sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
outer = module.__name__.partition(".")[0]

def shape(kind, deep):
    found = {"bases": [base.__name__ for base in kind.__mro__[1:-1]], "enum": [], "methods": [],
             "properties": [], "classes": {}}
    enum = list(getattr(kind, "__members__", {}))
    for name in sorted(dir(kind)):
        if name.startswith("_"):
            continue
        value = getattr(kind, name)
        if name in enum:
            found["enum"].append(name)
        elif isinstance(value, type) and deep:
            found["classes"][name] = shape(value, False)
        elif callable(value):
            found["methods"].append(name)
        else:
            found["properties"].append(name)
    return found

classes, functions, values = {}, [], []
for name in sorted(dir(module)):
    value = getattr(module, name)
    if name.startswith("_") or type(value).__name__ == "module":
        continue
    if isinstance(value, type):
        classes[name] = shape(value, True)
    elif callable(value):
        functions.append(name)
    else:
        values.append(name)
version = sys.argv[3]
print(json.dumps({"version": version, "classes": classes, "functions": functions,
                  "values": values}))
"""


def main() -> None:
    """Write one JSON file per version of TensorRT, and those of CUDA's own bindings."""
    for version, package in VERSIONS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            unpacked = wheel(folder, package, version)
            stubs = empty_libraries(folder / "stubs", major=version.partition(".")[0])
            write("tensorrt", version, dump(unpacked, "tensorrt_bindings", version, stubs))
    for version in CUDA_VERSIONS:
        with tempfile.TemporaryDirectory() as name:
            unpacked = wheel(Path(name), "cuda_bindings", version)
            wheel(Path(name), "cuda_pathfinder", "1.9.1")
            text = dump(unpacked, "cuda.bindings.runtime", version, None)
            write("cuda-runtime", version, text)


def wheel(folder: Path, package: str, version: str) -> Path:
    """Download one wheel and unpack it.

    Returns:
        The folder to put on `sys.path`.
    """
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        + [f"{package}=={version}"],
        check=True,
    )
    unpacked = folder / "unpacked"
    for file in folder.glob(f"{package}-*.whl"):
        zipfile.ZipFile(file).extractall(unpacked)
    return unpacked


def empty_libraries(folder: Path, *, major: str) -> Path:
    """Build the three shared libraries that hold the symbols and do nothing."""
    folder.mkdir()
    source = folder / "stub.c"
    source.write_text(SYMBOLS)
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(source)], check=True)
    return folder


def dump(unpacked: Path, module: str, version: str, stubs: Path | None) -> str:
    """Import the module in a process of its own and list its names."""
    environment = dict(os.environ)
    if stubs is not None:
        environment["LD_LIBRARY_PATH"] = str(stubs)
    done = subprocess.run(
        [sys.executable, "-c", DUMP, str(unpacked), module, version],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return done.stdout


def write(name: str, version: str, text: str) -> None:
    """One file per version, small enough to review."""
    FOLDER.mkdir(exist_ok=True)
    file = FOLDER / f"{name}-{version}.json"
    file.write_text(json.dumps(json.loads(text), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
