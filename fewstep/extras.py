"""Which extra brings which optional package, so that a failed import can name its remedy."""

from fewstep.errors import MissingExtraError

EXTRA_OF = {
    "accelerate": "torch",
    "diffusers": "torch",
    "peft": "torch",
    "torch": "torch",
    "transformers": "torch",
    "datasets": "data",
    "pyarrow": "data",
    "bitsandbytes": "quant",
    "torchao": "quant",
    "matplotlib": "train",
    "prdc": "train",
    "scipy": "train",
    "sklearn": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "skimage": "export",
    "onnxruntime": "runtime",
    "openvino": "openvino",
    "cuda": "tensorrt",
    "filelock": "tensorrt",
    "tensorrt": "tensorrt",
    "modelopt": "modelopt",
    "fastapi": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
}
"""Import name -> the fewstep extra that installs it."""


def missing_extra(error: ModuleNotFoundError) -> MissingExtraError | None:
    """The error to show instead, or None when what is missing belongs to no extra.

    Args:
        error: From an import that failed.
    """
    package = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(package)
    return MissingExtraError(package, extra) if extra else None
