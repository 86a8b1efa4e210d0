"""A part of a pipeline as it is exported: a module with flat arguments, and its contract."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.errors import ExportError

Kind = Literal["model", "float32", "int64"]
DTYPES = {"float32": torch.float32, "int64": torch.int64}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output.

    Attributes:
        name: In the graph.
        dims: One per axis: a number, a symbol, or (outputs) "symbol * number". A scalar has none.
        kind: "model" follows the precision asked for.
    """

    name: str
    dims: tuple[str, ...] = ()
    kind: Kind = "model"


@dataclass(frozen=True, slots=True)
class Part:
    """One component: what is traced and what its graph must look like.

    Attributes:
        name: Folder it is written to.
        module: Takes the inputs in order and returns a tensor or a tuple, in the outputs' order.
        inputs: Names and dims of the arguments.
        outputs: Of the results.
        config: Its config.json.
        sizes: Symbol -> size in the example; all different, above 1, multiples of `multiples`.
        multiples: Symbol -> what it must be divisible by.
        vocabulary: Token ids of the example are below this.
        timestep: Of the example, as the network is told it.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    multiples: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 0
    timestep: float = 500.0

    def __post_init__(self) -> None:
        symbols = {dim for port in self.inputs for dim in port.dims if not dim.isdigit()}
        if symbols != set(self.sizes):
            raise ExportError(
                f"{self.name} has symbols {sorted(symbols)}, sizes for {sorted(self.sizes)}"
            )
        values = list(self.sizes.values())
        if len(set(values)) != len(values) or min(values, default=2) < 2:
            # equal sizes are traced as one symbol, and 1 as no symbol at all
            raise ExportError(f"the example sizes of {self.name} must differ and be at least 2")

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    def example(
        self, sizes: Mapping[str, int] | None = None, *, seed: int = 0
    ) -> dict[str, Tensor]:
        """Random inputs.

        Args:
            sizes: Symbol -> size; None takes the part's own.
            seed: Of the values.
        """
        chosen = self.sizes if sizes is None else sizes
        generator = torch.Generator().manual_seed(seed)
        return {port.name: self._value(port, chosen, generator) for port in self.inputs}

    def _value(self, port: Port, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
        shape = [int(dim) if dim.isdigit() else sizes[dim] for dim in port.dims]
        if port.name.endswith("mask"):
            return torch.ones(shape, dtype=torch.int64)
        if port.kind == "int64":
            return torch.randint(0, max(self.vocabulary, 1), shape, generator=generator)
        dtype = DTYPES.get(port.kind, self.dtype)
        if port.name.startswith("timestep"):
            return torch.full(shape, self.timestep, dtype=dtype)
        return torch.randn(shape, generator=generator).to(dtype)
