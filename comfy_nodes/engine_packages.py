"""What each provider needs in ComfyUI's Python, and the command that installs it. No ComfyUI."""

import sys
from importlib.util import find_spec

from fewstep.errors import RuntimeSettingError

PACKAGES = {
    "auto": "onnxruntime",
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "tensorrt": 'onnxruntime-gpu "tensorrt-cu13<11"',
    "tensorrt-native": "tensorrt-cu13 cuda-bindings filelock",
    "openvino": "openvino",
    "openvino-bf16": "openvino",
    "directml": "onnxruntime-directml",
    "coreml": "onnxruntime",
}
"""Provider -> what pip installs for it."""

PROVIDERS = tuple(PACKAGES)
"""What a folder can be run on; "auto" measures those that are there."""

IMPORTED = {
    "openvino": ("openvino",),
    "openvino-bf16": ("openvino",),
    "tensorrt-native": ("tensorrt", "cuda"),
}
"""Provider -> what it imports, where that is not onnxruntime alone."""


def require(provider: str) -> None:
    """See that a provider can be used.

    Raises:
        RuntimeSettingError: A package is missing, or onnxruntime was built without the provider;
            the message has the command that helps.
    """
    wanted = ("tokenizers", *IMPORTED.get(provider, ("onnxruntime",)))
    missing = [name for name in wanted if find_spec(name) is None]
    if provider == "auto" and missing == ["onnxruntime"] and find_spec("openvino") is not None:
        return
    if missing:
        packages = missing[0] if missing == ["tokenizers"] else PACKAGES[provider]
        raise RuntimeSettingError(
            f'"Few-Step Engine Loader" needs {missing[0]} for provider {provider}, and ComfyUI\'s '
            f"Python does not have it; run `{command(packages)}` and start ComfyUI again."
        )
    if "onnxruntime" in wanted and provider != "auto":
        _require_built_in(provider)


def command(packages: str) -> str:
    """What to type, with the very Python that runs ComfyUI (a portable one has its own)."""
    return f'"{sys.executable}" -m pip install {packages}'


def _require_built_in(provider: str) -> None:
    from fewstep.runtime.onnx_session import available_providers

    there = available_providers()
    if provider not in there:
        raise RuntimeSettingError(
            f"The onnxruntime of ComfyUI's Python has no {provider} provider, only "
            f"{', '.join(there)}; uninstall it and run `{command(PACKAGES[provider])}`, or choose "
            "another provider."
        )
