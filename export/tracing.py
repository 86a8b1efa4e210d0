"""A part through torch's exporter: an ONNX model whose weights keep their parameters' names."""

import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from fewstep.errors import ExportError
from fewstep.export.part import Part

KNOWN_FAILURES = {  # text in torch's message -> what to tell
    "!= 1": "an example dimension of 1 was traced as fixed",
    "Constraints violated": "the network fixes a size that should stay free",
    "Mod(": "the network asks for sizes divisible by a power of two",
    "complex": "the network computes with complex numbers, which ONNX has not",
}


def trace(part: Part, *, opset: int) -> ir.Model:
    """The part as an ONNX model, not yet optimised.

    Args:
        part: What to export; its module is put into evaluation mode.
        opset: Of the ai.onnx domain, 18 or later.

    Returns:
        Weights are initializers under their parameter names ("model.conv_in.weight").

    Raises:
        ExportError: torch cannot trace it; the message has torch's reason in short.
    """
    example = part.example()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                part.module.eval(),
                (),
                kwargs=example,
                dynamic_shapes=_dynamic_shapes(part),
                input_names=list(example),
                output_names=[port.name for port in part.outputs],
                opset_version=opset,
                dynamo=True,
                external_data=True,
                custom_translation_table={operator.floordiv: _floor_divide},
                optimize=False,  # its constant folding gives transposed weights new names
                verify=False,
                report=False,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"{part.name} ({type(part.module).__name__}) cannot be exported: {_reason(error)}"
        ) from error
    assert program is not None
    return program.model


def _floor_divide(dividend: Any, divisor: Any) -> Any:
    """Whole numbers rounded down: torch writes a plain Div, which rounds -3 / 2 to -1.

    SD3's crop of its position table meets negative numbers at odd numbers of patches.
    """
    rest: Any = op.Mod(dividend, divisor)
    whole: Any = op.Sub(dividend, rest)
    return op.Div(whole, divisor)


def _dynamic_shapes(part: Part) -> dict[str, Any]:
    # AUTO: torch finds the relations itself; what the part must be divisible by is told in the
    # manifest, and symbols get their contract's names after the export.
    auto = torch.export.Dim.AUTO
    return {
        port.name: {axis: auto for axis, dim in enumerate(port.dims) if not dim.isdigit()}
        for port in part.inputs
    }


def _reason(error: BaseException) -> str:
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    whole = "\n".join(texts)
    for sign, meaning in KNOWN_FAILURES.items():
        if sign in whole:
            return f"{meaning} ({_first_line(texts[-1])})"
    return _first_line(texts[-1])


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "torch gave no reason"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of optional packages and of its own internals; none of it is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
