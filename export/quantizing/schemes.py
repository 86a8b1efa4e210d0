"""The ways to write a graph in fewer bits, all through ONNX Runtime's own quantizers."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx
import onnx_ir as ir

from fewstep.errors import ExportError
from fewstep.export.quantizing.layers import Layer, split_linear
from fewstep.export.quantizing.processor import adds_without_clipping
from fewstep.runtime.manifest import Precision
from fewstep.runtime.session import Feeds

Activations = Literal["uint8", "uint16", "int8"]


class Scheme(ABC):
    """One way.

    Attributes:
        precision: What the manifest calls it.
        kinds: Kinds of layers it reaches.
        needs_feeds: Whether it looks at inputs the graph is really given.
    """

    precision: ClassVar[Precision]
    kinds: ClassVar[tuple[str, ...]] = ("MatMul",)
    needs_feeds: ClassVar[bool] = False

    def prepare(self, model: ir.Model) -> None:
        """Rewrite a graph, in place, so that all of its layers can be reached."""
        split_linear(model)

    @abstractmethod
    def quantize(
        self, source: Path, target: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]
    ) -> None:
        """Write a quantized graph.

        Args:
            source: A graph after `prepare`, saved; other files are made beside it.
            target: Where the result goes, weights beside it.
            layers: Those that are quantized; the others stay as they are.
            feeds: Inputs along trajectories, where `needs_feeds`.
        """

    @property
    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """Its settings, for the record beside the graphs."""


@dataclass(frozen=True, slots=True)
class Int8Dynamic(Scheme):
    """Weights in 8 bits per channel; activations are measured anew in every call."""

    precision: ClassVar[Precision] = "int8-dynamic"

    def quantize(
        self, source: Path, target: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]
    ) -> None:
        del feeds
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with quiet():
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=not adds_without_clipping(),
                weight_type=QuantType.QInt8,
                nodes_to_quantize=node_names(layers),
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
            )

    @property
    def notes(self) -> dict[str, Any]:
        return {"weights": "int8 per channel", "seven_bits": not adds_without_clipping()}


@dataclass(frozen=True, slots=True)
class Int8Static(Scheme):
    """Weights and activations between QuantizeLinear and DequantizeLinear, ranges from feeds.

    Attributes:
        activations: "uint8" and "uint16" for processors; "int8" is the symmetric form that
            TensorRT takes (zero points of 0, biases as they are, a pair of nodes per use).
    """

    precision: ClassVar[Precision] = "int8-static"
    kinds: ClassVar[tuple[str, ...]] = ("MatMul", "Gemm", "Conv")
    needs_feeds: ClassVar[bool] = True
    activations: Activations = "uint8"

    def prepare(self, model: ir.Model) -> None:
        """Leaves Gemm as it is: ONNX Runtime has a kernel for a quantized one."""

    def quantize(
        self, source: Path, target: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]
    ) -> None:
        if not feeds:
            raise ExportError("there are no inputs to calibrate with; give at least one prompt")
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        types = {"uint8": QuantType.QUInt8, "uint16": QuantType.QUInt16, "int8": QuantType.QInt8}
        with quiet():
            quantize_static(
                source,
                target,
                Calibration(feeds),  # pyright: ignore[reportArgumentType]
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(self.kinds),
                per_channel=True,
                reduce_range=self._has_seven_bits,
                activation_type=types[self.activations],
                weight_type=QuantType.QInt8,
                nodes_to_quantize=node_names(layers),
                use_external_data_format=True,
                extra_options=self._options(),
            )

    @property
    def _has_seven_bits(self) -> bool:
        return self.activations == "uint8" and not adds_without_clipping()

    def _options(self) -> dict[str, Any]:
        is_symmetric = self.activations == "int8"
        floats = ["MatMul", "Gemm", *(["Conv"] if is_symmetric else [])]
        return {
            "ActivationSymmetric": is_symmetric,
            "WeightSymmetric": True,
            "QuantizeBias": not is_symmetric,
            "DedicatedQDQPair": is_symmetric,
            # what a layer gives stays float: its reader decides whether 8 bits are enough
            "OpTypesToExcludeOutputQuantization": floats,
            "MatMulConstBOnly": True,
        }

    @property
    def notes(self) -> dict[str, Any]:
        return {
            "weights": "int8 per channel",
            "activations": self.activations,
            "seven_bits": self._has_seven_bits,
        }


@dataclass(frozen=True, slots=True)
class Int4(Scheme):
    """Weights in 4 bits, a scale per block; products as ONNX Runtime's MatMulNBits makes them.

    Attributes:
        block: Weights per scale; 16 and powers of two above.
        accuracy: 4 rounds activations to 8 bits inside the kernel (fast), 1 keeps float32.
    """

    precision: ClassVar[Precision] = "int4"
    block: int = 32
    accuracy: Literal[1, 4] = 4

    def quantize(
        self, source: Path, target: Path, layers: Sequence[Layer], feeds: Sequence[Feeds]
    ) -> None:
        del feeds
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        model = onnx.load(source)
        # it reads an empty list as "all", and has no names of its own to say "only these"
        names = set(node_names(layers))
        others = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.name not in names]
        with quiet():
            quantizer = MatMulNBitsQuantizer(
                model,
                bits=4,
                block_size=self.block,
                is_symmetric=True,
                accuracy_level=self.accuracy,
                nodes_to_exclude=others,
            )
            quantizer.process()
        proto: Any = quantizer.model  # ONNX Runtime's wrapper, whatever its annotation says
        made = ir.serde.deserialize_model(proto.model)
        ir.save(made, target, external_data=f"{target.name}_data")

    @property
    def notes(self) -> dict[str, Any]:
        return {
            "weights": f"int4 in blocks of {self.block}",
            "activations": "int8 in the kernel" if self.accuracy == 4 else "as they are",
        }


class Calibration:
    """Feeds one by one, as the calibrators of ONNX Runtime and nvidia-modelopt ask for them."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._feeds = feeds
        self._waiting: Iterator[Feeds] = iter(feeds)

    def get_first(self) -> dict[str, Any]:
        """The first, whatever was asked for before."""
        return dict(self._feeds[0])

    def rewind(self) -> None:
        """Begin again."""
        self._waiting = iter(self._feeds)

    def get_next(self) -> dict[str, Any] | None:
        """The next, or None."""
        found = next(self._waiting, None)
        return None if found is None else dict(found)


def node_names(layers: Sequence[Layer]) -> list[str]:
    """Of all their nodes."""
    return [name for layer in layers for name in layer.nodes]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the quantizers' hints, which are meant for those who call them by hand."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
