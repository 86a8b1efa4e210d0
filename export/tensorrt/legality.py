"""Whether TensorRT's parser would take a graph, said without TensorRT.

A graph that passes was statically checked, not built: the parser and the builder have rules that
are written down nowhere. A graph that fails would have failed after minutes of loading.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnx import NodeProto

from fewstep.errors import ExportError
from fewstep.export.tensorrt.dtype_flow import check_flow
from fewstep.export.tensorrt.graph import ReadGraph, name_of, read_graph
from fewstep.export.tensorrt.node_rules import NODE_RULES
from fewstep.export.tensorrt.operators import (
    CONSTANT_INPUTS,
    DATA_INPUT,
    DYNAMIC,
    OLDEST_OPSET,
    OPERATORS,
    OPSETS,
    VENDOR,
    VENDOR_OPERATORS,
    Version,
    release_for_opset,
)
from fewstep.export.tensorrt.stored_data import check_stored_data

Rule = Literal[
    "opset", "domain", "operator", "release", "type", "constant", "attribute", "flow", "data"
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing TensorRT would refuse.

    Attributes:
        rule: Kind of rule.
        node: Name of the node, weight or input.
        message: What it has and what is wanted.
    """

    rule: Rule
    node: str
    message: str


@dataclass(frozen=True, slots=True)
class Report:
    """What the check found.

    Attributes:
        path: Of the graph.
        opset: Of the graph.
        operators: Name -> number of nodes.
        findings: Empty where nothing speaks against it.
    """

    path: Path
    opset: int
    operators: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def is_legal(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.findings

    def require(self) -> None:
        """Raise where something speaks against it.

        Raises:
            ExportError: Names the first finding and counts the others.
        """
        if not self.findings:
            return
        first, rest = self.findings[0], len(self.findings) - 1
        more = f", and {rest} more findings" if rest else ""
        raise ExportError(
            f"TensorRT would refuse {self.path}: {first.node}: {first.message}{more}; "
            "`fewstep export tensorrt DIR --dry-run` lists them all"
        )


def check_graph(path: Path, *, tensorrt: Version) -> Report:
    """Check one ONNX file.

    Args:
        path: Of the file; its external data must lie beside it.
        tensorrt: Release it is meant for, (11, 4).

    Raises:
        ExportError: It cannot be read.
    """
    read = read_graph(path)
    nodes = list(read.graph.node)
    findings = [*_opset(read, tensorrt), *_domains(read)]
    for node in nodes:
        found = _operator(node, tensorrt)
        findings += found or [*_types(node, read), *_constants(node, read)]
        for rule in NODE_RULES.get(node.op_type, ()):
            findings += [Finding("attribute", name_of(node), text) for text in rule(node, read)]
    findings += [Finding("flow", where, text) for where, text in check_flow(read)]
    findings += [Finding("data", where, text) for where, text in check_stored_data(read)]
    return Report(path, read.opset, dict(Counter(node.op_type for node in nodes)), tuple(findings))


def _opset(read: ReadGraph, tensorrt: Version) -> list[Finding]:
    since = release_for_opset(read.opset)
    if since is None:
        newest = OPSETS[-1][0]
        text = f"opset {read.opset}; TensorRT takes {OLDEST_OPSET} to {newest}"
        return [Finding("opset", "graph", text)]
    if since > tensorrt:
        text = f"opset {read.opset} needs TensorRT {_text(since)}, not {_text(tensorrt)}"
        return [Finding("opset", "graph", text)]
    return []


def _domains(read: ReadGraph) -> list[Finding]:
    strange = {node.domain for node in read.graph.node} - {"", "ai.onnx"}
    found = [
        Finding("domain", name_of(node), f"{node.domain}.{node.op_type} is not an ONNX operator")
        for node in read.graph.node
        if node.domain in strange and not _is_vendors(node)
    ]
    return found[:20]  # an optimised graph has hundreds, one sentence is enough for all


def _operator(node: NodeProto, tensorrt: Version) -> list[Finding]:
    if node.domain not in ("", "ai.onnx") and not _is_vendors(node):
        return []  # `_domains` names it
    if node.op_type in DYNAMIC:
        text = f"{node.op_type} makes sizes depend on values; export without it"
        return [Finding("operator", name_of(node), text)]
    known = (VENDOR_OPERATORS if _is_vendors(node) else OPERATORS).get(node.op_type)
    if known is None:
        return [Finding("operator", name_of(node), f"TensorRT has no {node.op_type}")]
    if known.since > tensorrt:
        text = f"{node.op_type} needs TensorRT {_text(known.since)}, not {_text(tensorrt)}"
        return [Finding("release", name_of(node), text)]
    return []


def _types(node: NodeProto, read: ReadGraph) -> list[Finding]:
    known = OPERATORS.get(node.op_type)
    if known is None or node.domain not in ("", "ai.onnx"):
        return []
    index = DATA_INPUT.get(node.op_type, 0)
    value = node.input[index] if index < len(node.input) else node.output[0]
    if node.op_type == "ConstantOfShape":  # its input is a shape
        value = node.output[0]
    kind = read.types.get(value)
    if kind is None or kind in known.types or value in read.constants:
        return []  # what is constant is folded before types matter
    wanted = ", ".join(sorted(known.types))
    return [Finding("type", name_of(node), f"{node.op_type} of {kind}; TensorRT takes {wanted}")]


def _constants(node: NodeProto, read: ReadGraph) -> list[Finding]:
    found = []
    for index in CONSTANT_INPUTS.get(node.op_type, ()):
        if index < len(node.input) and node.input[index]:
            if node.input[index] not in read.constants:
                text = f"input {index} of {node.op_type} must be a constant"
                found.append(Finding("constant", name_of(node), text))
    return found


def _is_vendors(node: NodeProto) -> bool:
    return node.domain == VENDOR and node.op_type in VENDOR_OPERATORS


def _text(version: Version) -> str:
    return ".".join(str(part) for part in version)
