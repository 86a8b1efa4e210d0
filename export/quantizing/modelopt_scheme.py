"""fp8 and int8 by NVIDIA's nvidia-modelopt, for GPUs: an optional package with pins of its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from fewstep.errors import ExportError, MissingExtraError
from fewstep.export.quantizing.layers import Layer
from fewstep.export.quantizing.schemes import Calibration, Scheme, node_names, quiet
from fewstep.runtime.manifest import Precision
from fewstep.runtime.session import Feeds

EXTRA = "modelopt"
PROVIDERS = ["cpu"]
"""Ranges are found on the processor: the numbers are the same, and no GPU is needed to export."""


class ModelOpt(Scheme):
    """QuantizeLinear and DequantizeLinear as TensorRT reads them, ranges from trajectories.

    Raises:
        MissingExtraError: nvidia-modelopt is not installed.
    """

    kinds: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm", "Conv")
    needs_feeds: ClassVar[bool] = True
    mode: ClassVar[Literal["fp8", "int8"]]

    def __post_init__(self) -> None:
        _quantizer()  # said before anything is computed

    def prepare(self, model: ir.Model) -> None:
        """Leaves Gemm as it is, which TensorRT knows."""

    def quantize(
        self, source: Path, target: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]
    ) -> None:
        if not feeds:
            raise ExportError("there are no inputs to calibrate with; give at least one prompt")
        names = [f"^{re.escape(name)}$" for name in node_names(layers)]  # it takes expressions
        with quiet():
            _quantizer()(
                str(source),
                quantize_mode=self.mode,
                calibration_data_reader=Calibration(feeds),
                calibration_method="max",
                calibration_eps=PROVIDERS,
                op_types_to_quantize=list(self.kinds),
                nodes_to_quantize=names,
                use_external_data_format=True,
                high_precision_dtype="fp32",  # what stays float stays what the manifest says
                mha_accumulation_dtype="fp32",
                disable_mha_qdq=True,
                dq_only=True,  # weights are stored rounded, not rounded anew at every build
                output_path=str(target),
                log_level="ERROR",
            )

    @property
    def notes(self) -> dict[str, Any]:
        return {"weights": self.mode, "activations": self.mode, "made_by": "nvidia-modelopt"}


@dataclass(frozen=True, slots=True)
class ModelOptFp8(ModelOpt):
    """8 bit floats (e4m3), for Ada, Hopper and later."""

    precision: ClassVar[Precision] = "fp8"
    mode: ClassVar[Literal["fp8", "int8"]] = "fp8"


@dataclass(frozen=True, slots=True)
class ModelOptInt8(ModelOpt):
    """8 bit integers, symmetric."""

    precision: ClassVar[Precision] = "int8-static"
    mode: ClassVar[Literal["fp8", "int8"]] = "int8"


def _quantizer() -> Any:
    try:
        from modelopt.onnx.quantization import (  # pyright: ignore[reportMissingImports]
            quantize,
        )
    except ImportError as error:
        raise MissingExtraError("nvidia-modelopt", EXTRA) from error
    return quantize
