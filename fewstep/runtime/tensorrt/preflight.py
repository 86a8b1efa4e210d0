"""What must be there before TensorRT is touched, each absence as one sentence."""

from importlib import metadata

from fewstep.errors import MissingExtraError, RuntimeSettingError
from fewstep.runtime.tensorrt.identity import Installation, this_system
from fewstep.runtime.tensorrt.library import library

OLDEST = (10, 12)
"""First release whose names are all used here and checked (tests/export/tensorrt)."""
NEWEST_MAJOR = 11
ORT_MAJOR = 10
"""What the TensorRT provider of onnxruntime-gpu 1.31 links: libnvinfer.so.10."""
DISTRIBUTIONS = ("tensorrt_cu13_bindings", "tensorrt_cu12_bindings", "tensorrt-cu13", "tensorrt")


def installed_tensorrt() -> str | None:
    """Version of the TensorRT package here, without importing it; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version(version: str) -> None:
    """Refuse a release whose API differs from the one used.

    Raises:
        RuntimeSettingError: Too old, or of a newer major.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST or major > NEWEST_MAJOR:
        wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST_MAJOR}.x"
        raise RuntimeSettingError(
            f"TensorRT {version} is installed and fewstep uses {wanted}; run: pip install "
            '"fewstep[tensorrt]"'
        )


def require_tensorrt() -> str:
    """Import TensorRT once.

    Returns:
        Its full version.

    Raises:
        MissingExtraError: The package is not installed.
        RuntimeSettingError: It is, but its libraries are not found, or it is of another API.
    """
    try:
        trt = library()
    except ModuleNotFoundError:
        raise MissingExtraError("tensorrt", "tensorrt") from None
    except (ImportError, OSError) as error:
        raise RuntimeSettingError(
            f"TensorRT's Python package is installed but its libraries are not found ({error}); "
            "install the package that brings them: pip install tensorrt-cu13, or put the folder of "
            "libnvinfer on the library path"
        ) from None
    version = str(trt.__version__)
    check_version(version)
    return version


def require_gpu(device: int = 0) -> str:
    """Look for a GPU through CUDA's own bindings.

    Args:
        device: Its number.

    Returns:
        Its architecture, "sm90".

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        RuntimeSettingError: There is no GPU, no such GPU or no driver.
    """
    from fewstep.runtime.tensorrt.cuda import architecture, device_count

    count = device_count()
    if device >= count:
        raise RuntimeSettingError(
            f"device {device} was asked for and this machine has {count} CUDA GPUs; use provider "
            '"cpu", or a smaller number'
        )
    return architecture(device)


def this_installation(device: int = 0) -> Installation:
    """What an engine would meet here; touches TensorRT and the GPU.

    Raises:
        MissingExtraError: A package is missing.
        RuntimeSettingError: No GPU, no driver, or TensorRT's libraries are not found.
    """
    from fewstep.runtime.tensorrt.cuda import runtime_major

    version = require_tensorrt()
    sm = require_gpu(device)
    return Installation(tensorrt=version, cuda=runtime_major(), sm=sm, system=this_system())


def check_ort_tensorrt(tensorrt: str | None) -> None:
    """Before ONNX Runtime's TensorRT provider is used: it cannot load TensorRT 11.

    Args:
        tensorrt: Installed version; None where there is none.

    Raises:
        RuntimeSettingError: There is none, or it is of another major.
    """
    if tensorrt is None:
        raise RuntimeSettingError(
            "ONNX Runtime's TensorRT provider needs TensorRT's libraries and none are installed; "
            'run: pip install "fewstep[ort-tensorrt]"'
        )
    if int(tensorrt.partition(".")[0]) != ORT_MAJOR:
        raise RuntimeSettingError(
            f"ONNX Runtime's TensorRT provider loads TensorRT {ORT_MAJOR} and TensorRT {tensorrt} "
            'is installed; use provider "tensorrt-native", or in an '
            'environment of its own: pip install "fewstep[ort-tensorrt]"'
        )
