"""A real tritonserver, from the nvidia-pytriton wheel, over a generated repository.

The wheel has the server and its Python backend only, and its Python must have numpy below 2: with
numpy 2 answers come back empty. So it lives in an environment of its own (`make triton`).
"""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
SHIM = Path(__file__).with_name("onnxruntime_shim.py")


def with_shim(repository: Path) -> None:
    """Put the Python stand-in where a component asks for the ONNX Runtime backend."""
    for config in repository.glob("*/config.pbtxt"):
        text = config.read_text()
        if 'backend: "onnxruntime"' in text:
            config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
            shutil.copyfile(SHIM, config.parent / "1" / "model.py")


@contextmanager
def running(environment: Path, repository: Path, log: Path, port: int) -> Iterator[str]:
    """The server's address while it runs.

    Args:
        environment: What `make triton` installs.
        repository: With the shim in it.
        log: What the server says.
        port: HTTP; metrics are on the next.
    """
    home = next(environment.glob("lib/python3*/site-packages/pytriton/tritonserver"))
    version = home.parents[2].name.removeprefix("python")
    backend = home / "backends" / "python"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not (backend / stub.name).is_file():
        shutil.copy(stub, backend)
    libraries = home.parents[1] / "nvidia_pytriton.libs"
    variables = os.environ | {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": f"{libraries}:{home / 'external_libs'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(home / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={home / 'backends'}",
        f"--http-port={port}",
        f"--metrics-port={port + 1}",
        "--allow-grpc=false",
        "--exit-timeout-secs=5",
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=variables, cwd=repository
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(process, f"{address}/v2/health/ready", log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"the server ended\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(ready, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"the server is not ready\n{log.read_text()[-4000:]}")


def infer(address: str, **inputs: list[Any]) -> dict[str, np.ndarray]:
    """One request in Triton's JSON form; rows of a batch per input."""
    kinds = {"prompt": "BYTES", "negative_prompt": "BYTES", "seed": "INT64", "steps": "INT32"}
    body = {
        "inputs": [
            {
                "name": name,
                "datatype": kinds.get(name, "INT32"),
                "shape": [len(rows), 2 if name == "size" else 1],
                "data": rows,
            }
            for name, rows in inputs.items()
        ]
    }
    request = urllib.request.Request(
        f"{address}/v2/models/fewstep_pipeline/infer",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error)["error"]) from None
    return {
        entry["name"]: np.array(entry["data"]).reshape(entry["shape"]) for entry in found["outputs"]
    }


def metrics(port: int) -> str:
    """What a monitoring system reads."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port + 1}/metrics", timeout=10) as answer:
        return answer.read().decode()
