"""Operators of ONNX that TensorRT's parser takes, the types it takes them in, and since when.

The base is the parser's public list of release 10.1; later entries are from release notes. A type
that the list does not name may work in a newer release; it is refused here because nothing says so.
Operators whose output size depends on values (NonZero, Compress, NonMaxSuppression) and control
flow (If, Loop, Scan) are left out on purpose: the parser takes some, and a few-step graph that
holds one was exported wrong.
"""

from dataclasses import dataclass

FLOATS = frozenset({"float32", "float16", "bfloat16"})
NUMBERS = FLOATS | {"int32", "int64"}
ANY = NUMBERS | {"bool"}
BOOL = frozenset({"bool"})
HALVES = frozenset({"float32", "float16"})
CASTS = ANY | {"uint8"}
QUANTISED = frozenset({"int8", "float8_e4m3fn", "int4", "float4e2m1"})

Version = tuple[int, int]
BASE: Version = (10, 1)


@dataclass(frozen=True, slots=True)
class Operator:
    """What the parser says of one operator.

    Attributes:
        types: Element types of its data input.
        since: First release of TensorRT that takes it.
    """

    types: frozenset[str]
    since: Version = BASE


def _group(names: str, types: frozenset[str], since: Version = BASE) -> dict[str, Operator]:
    return {name: Operator(types, since) for name in names.split()}


OPERATORS: dict[str, Operator] = {
    **_group("And Not Or Xor", BOOL),
    **_group("Cast CastLike", CASTS),
    **_group("DeformConv GridSample Mish RoiAlign", HALVES),
    **_group(
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv "
        "ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool "
        "GlobalLpPool GlobalMaxPool GroupNormalization GRU HardSigmoid HardSwish Hardmax "
        "InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM "
        "LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization Pow PRelu RandomNormal "
        "RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RNN Round Selu Sigmoid "
        "Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
        FLOATS,
    ),
    **_group(
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less "
        "LessOrEqual Max Mean Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
        "Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK Gelu",
        NUMBERS,
    ),
    **_group(
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND "
        "Identity OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose "
        "Trilu Unsqueeze Where",
        ANY,
    ),
    **_group("QuantizeLinear", FLOATS),
    **_group("DequantizeLinear", QUANTISED),
    **_group("Attention", FLOATS, (10, 14)),
    **_group("RMSNormalization RotaryEmbedding", FLOATS, (10, 15)),
    **_group("Swish", FLOATS, (11, 0)),
}
"""Name in the ai.onnx domain -> what is known of it."""

VENDOR = "trt"
"""Domain of the operators that TensorRT adds to those of ONNX."""

VENDOR_OPERATORS = {"TRT_FP4DynamicQuantize": Operator(FLOATS, (10, 8))}
"""Name in that domain -> what is known of it."""

DYNAMIC = frozenset({"If", "Loop", "Scan", "NonZero", "Compress", "NonMaxSuppression", "Unique"})
"""Control flow, and operators whose output size depends on values."""

DATA_INPUT = {"Where": 1}
"""Operators whose type is that of another input than the first."""

CONSTANT_INPUTS = {
    **{name: (1,) for name in OPERATORS if name.startswith("Reduce")},
    **{name: (1,) for name in ("Squeeze", "Unsqueeze", "CumSum", "OneHot")},
    "Slice": (3,),
    "Pad": (3,),
}
"""Operator -> inputs that the parser must know when it builds."""

OLDEST_OPSET = 9
OPSETS: tuple[tuple[int, Version], ...] = (
    (20, BASE),
    (22, (10, 9)),
    (23, (10, 14)),
    (24, (11, 0)),
    (25, (11, 5)),
)
"""Newest opset -> first release documented to take it, ascending."""


def release_for_opset(opset: int) -> Version | None:
    """First release that takes an opset; None where no release does."""
    if opset < OLDEST_OPSET:
        return None
    return next((since for newest, since in OPSETS if opset <= newest), None)
