"""From a traced part to the graph that is written: folded, named, stripped."""

import onnx_ir as ir
from onnxscript import optimizer

from fewstep import __version__
from fewstep.export.attention_masks import widen_masks
from fewstep.export.gelu import halve_first
from fewstep.export.graph_names import name_dims, name_weights, strip_sources
from fewstep.export.part import Part
from fewstep.export.tracing import trace
from fewstep.export.upsampling import split_upsampling


def make_graph(part: Part, *, opset: int) -> ir.Model:
    """The part's portable ONNX model: standard operators only, weights by parameter name.

    Raises:
        ExportError: It cannot be traced, or a size that should be free was fixed.
    """
    model = trace(part, opset=opset)
    name_weights(model)
    optimizer.optimize(model, onnx_shape_inference=False)
    split_upsampling(model)
    halve_first(model)
    widen_masks(model)
    name_dims(model, part)
    strip_sources(model)
    model.producer_name, model.producer_version = "fewstep", __version__
    model.graph.name = part.name
    return model
