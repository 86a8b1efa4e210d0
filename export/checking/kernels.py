"""Which operators of a graph ONNX Runtime has kernels for."""

from collections.abc import Mapping
from pathlib import Path

import onnx

PROVIDER = "CPUExecutionProvider"
Key = tuple[str, str]


def uncovered(file: Path, provider: str = PROVIDER) -> tuple[str, ...]:
    """Operators without a kernel, which run as many small ones (or not at all), "domain.Name-18".

    Args:
        file: The graph; its weights are not read.
        provider: ONNX Runtime's name of the engine.
    """
    model = onnx.load(file, load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    kernels = _kernels(provider)
    functions = {(function.domain, function.name) for function in model.functions}
    found: set[str] = set()
    for node in model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = opsets.get(node.domain, opsets.get(domain, 1))
        ranges = kernels.get((domain, node.op_type), ())
        if (domain, node.op_type) in functions:
            continue
        if not any(first <= version <= last for first, last in ranges):
            prefix = f"{domain}." if domain else ""
            found.add(f"{prefix}{node.op_type}-{version}")
    return tuple(sorted(found))


def _kernels(provider: str) -> Mapping[Key, list[tuple[int, int]]]:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def

    found: dict[Key, list[tuple[int, int]]] = {}
    for kernel in get_all_opkernel_def():
        if kernel.provider == provider:
            found.setdefault((kernel.domain, kernel.op_name), []).append(kernel.version_range)
    return found
