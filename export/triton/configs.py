"""config.pbtxt of the pipeline model and of every component."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fewstep.errors import ExportError
from fewstep.export.triton.pbtxt import Message, Word
from fewstep.runtime.manifest import Graph, Tensor

Device = Literal["cpu", "gpu"]
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
"""Element type -> Triton's; bfloat16 has no place in its ONNX Runtime backend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """How a repository serves.

    Attributes:
        device: Where components run.
        instances: Copies of each component; several share nothing.
        max_batch: Pictures drawn together by the pipeline model.
        queue_delay_us: How long the first request of a batch waits for others.
        max_queue: Requests that may wait; more are refused at once.
        timeout_us: How long one may wait.
    """

    device: Device = "cpu"
    instances: int = 1
    max_batch: int = 4
    queue_delay_us: int = 20_000
    max_queue: int = 64
    timeout_us: int = 60_000_000

    def __post_init__(self) -> None:
        if self.instances < 1 or self.max_batch < 1:
            raise ExportError(
                f"--instances is {self.instances} and --max-batch {self.max_batch}, wanted at "
                "least 1 of each"
            )

    @property
    def instance_group(self) -> Message:
        """Of a component."""
        kind = Word("KIND_GPU" if self.device == "gpu" else "KIND_CPU")
        return Message((("kind", kind), ("count", self.instances)))


def component_config(
    name: str, graph: Graph, serving: Serving, *, sizes: Mapping[str, int]
) -> Message:
    """A component on Triton's ONNX Runtime backend.

    Its max_batch_size is 0, so dims are whole shapes: with a batch size Triton would put an axis
    before every tensor, and timesteps and position ids have none. Batches are made by the pipeline.

    Args:
        name: Of the model.
        graph: Of the component.
        serving: Where it runs.
        sizes: Symbol -> size of the call that warms it up.

    Raises:
        ExportError: An input or output has a type Triton cannot carry.
    """
    return Message(
        (
            ("name", name),
            ("backend", "onnxruntime"),
            ("max_batch_size", 0),
            ("input", [_port(tensor) for tensor in graph.inputs]),
            ("output", [_port(tensor) for tensor in graph.outputs]),
            ("instance_group", serving.instance_group),
            ("model_warmup", _warmup(graph, sizes)),
        )
    )


def pipeline_config(name: str, serving: Serving, *, parameters: dict[str, str]) -> Message:
    """The model that clients call: prompts in, pictures out.

    Args:
        name: Of the model.
        serving: Batches and limits.
        parameters: Read by its Python code.
    """
    policy = (
        ("max_queue_size", serving.max_queue),
        ("default_timeout_microseconds", serving.timeout_us),
        ("timeout_action", Word("REJECT")),
        ("allow_timeout_override", True),
    )
    batching = (
        ("max_queue_delay_microseconds", serving.queue_delay_us),
        ("default_queue_policy", Message(policy)),
    )
    return Message(
        (
            ("name", name),
            ("backend", "python"),
            ("max_batch_size", serving.max_batch),
            (
                "input",
                [
                    _free("prompt", "TYPE_STRING", [1]),
                    _free("negative_prompt", "TYPE_STRING", [1], is_optional=True),
                    _free("seed", "TYPE_INT64", [1], is_optional=True),
                    _free("steps", "TYPE_INT32", [1], is_optional=True),
                    _free("size", "TYPE_INT32", [2], is_optional=True),
                ],
            ),
            (
                "output",
                [_free("image", "TYPE_UINT8", [-1, -1, 3]), _free("seed", "TYPE_INT64", [1])],
            ),
            ("instance_group", Message((("kind", Word("KIND_CPU")), ("count", 1)))),
            ("dynamic_batching", Message(batching)),
            ("parameters", [_parameter(key, value) for key, value in parameters.items()]),
        )
    )


def _port(tensor: Tensor) -> Message:
    kind = TYPES.get(tensor.dtype)
    if kind is None:
        raise ExportError(
            f"{tensor.name} is {tensor.dtype}, which Triton's ONNX Runtime backend cannot carry; "
            "export with --precision fp16 or fp32"
        )
    dims = [int(dim) if dim.isdigit() else -1 for dim in tensor.dims]
    dims = dims or [1]  # scalars were lifted: Triton carries none
    return _free(tensor.name, kind, dims)


def _free(name: str, kind: str, dims: Sequence[int], *, is_optional: bool = False) -> Message:
    fields = (("name", name), ("data_type", Word(kind)), ("dims", list(dims)))
    return Message((*fields, ("optional", True)) if is_optional else fields)


def _parameter(key: str, value: str) -> Message:
    return Message((("key", key), ("value", Message((("string_value", value),)))))


def _warmup(graph: Graph, sizes: Mapping[str, int]) -> tuple[Message, ...]:
    """One call with zeros of the usual size; nothing where a size is unknown.

    Components only: models are loaded side by side, and a pipeline that calls a component which is
    not there yet takes the server down.
    """
    known = {dim for tensor in graph.inputs for dim in tensor.dims if not dim.isdigit()}
    if not known <= sizes.keys():
        return ()
    entries = []
    for tensor in graph.inputs:
        dims = [int(dim) if dim.isdigit() else sizes[dim] for dim in tensor.dims] or [1]
        kind = Word(TYPES[tensor.dtype])
        sample = Message((("data_type", kind), ("dims", dims), ("zero_data", True)))
        entries.append(Message((("key", tensor.name), ("value", sample))))
    return (Message((("name", "zeros"), ("batch_size", 1), ("inputs", entries))),)
