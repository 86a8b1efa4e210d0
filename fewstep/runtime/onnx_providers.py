"""What is asked of ONNX Runtime for each engine, and whether the session runs on it."""

from collections.abc import Sequence
from pathlib import Path

from fewstep.errors import RuntimeSettingError

TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"
PROVIDERS = {  # our name -> ONNX Runtime's, in its order of preference
    "tensorrt": TENSORRT,
    "cuda": CUDA,
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "cpu": CPU,
}
CUDA_OPTIONS = {"use_tf32": "0"}
"""Full float32 products, as on the processor: TF32 keeps 10 bits, which is another picture."""

Asked = tuple[str, dict[str, str]]
"""ONNX Runtime's name of a provider, and its options."""


def asked_providers(provider: str, engines: Path | None = None) -> list[Asked]:
    """Providers for a session, in order of preference; the last takes what the others cannot.

    TensorRT leaves operators that it does not know to CUDA. It rounds float32 products to TF32
    unless NVIDIA_TF32_OVERRIDE is 0 in the environment: ONNX Runtime has no option for that.
    Option names are those of ONNX Runtime's documentation; "cuda" and "tensorrt" have not run on a
    GPU with this release.

    Args:
        provider: Our name of it.
        engines: Folder of TensorRT's engines and timings; None keeps none. It must be this graph's
            alone: ONNX Runtime names an engine by the graph's operators, whatever the weights.
    """
    if provider == "cpu":
        return [(CPU, {})]
    if provider == "cuda":
        return [(CUDA, dict(CUDA_OPTIONS)), (CPU, {})]
    if provider == "tensorrt":
        kept = {} if engines is None else _kept_engines(engines)
        return [(TENSORRT, kept), (CUDA, dict(CUDA_OPTIONS)), (CPU, {})]
    return [(PROVIDERS[provider], {}), (CPU, {})]


def check_running(provider: str, running: Sequence[str]) -> None:
    """Refuse a session that runs elsewhere: ONNX Runtime goes on without a provider that fails.

    Args:
        provider: Our name of what was asked for.
        running: ONNX Runtime's names of what the session has.

    Raises:
        RuntimeSettingError: The provider is not among them.
    """
    if PROVIDERS[provider] in running:
        return
    names = {theirs: ours for ours, theirs in PROVIDERS.items()}
    found = [names.get(theirs, theirs) for theirs in running]
    raise RuntimeSettingError(
        f"provider {provider} was asked for, and ONNX Runtime could not start it and runs on "
        f"{', '.join(found)}; install the libraries and the driver that it needs (ONNX Runtime's "
        f'own message names what is missing), or use provider "{found[0]}"'
    )


def _kept_engines(folder: Path) -> dict[str, str]:
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
