"""This process among its peers: adapters are replicated, their gradients averaged once a step.

No wrapper is put around a network: every process computes its samples' gradients, and the few
megabytes of adapter gradients are averaged in one call. What may decide anything (metrics, scores,
the wish to stop) is exchanged first, so that all processes decide alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fewstep.errors import ConfigError

T = TypeVar("T")
BUCKET_NUMBERS = 2**25
"""Gradients that are averaged in one call: 128 MiB of float32, above most adapters."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process.

    Attributes:
        rank: 0 is the one that writes.
        size: How many there are.
        per_machine: How many of them share a machine; a divisor of `size`.
    """

    rank: int = 0
    size: int = 1
    per_machine: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes files and draws bars."""
        return self.rank == 0

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over processes; one reduction per bucket.

        A parameter that some processes did not reach counts as zero there; one that none reached
        stays without a gradient, so an optimizer passes it over as it does in a single process.
        """
        if self.size == 1:
            return
        for bucket in buckets(parameters):
            self._average(bucket)

    def _average(self, bucket: Sequence[nn.Parameter]) -> None:
        first = bucket[0]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        reached = [float(p.grad is not None) for p in bucket]
        flat = torch.cat([*(part.flatten() for part in parts), first.new_tensor(reached)])
        dist.all_reduce(flat)
        flat /= self.size
        *means, shares = flat.split([*(p.numel() for p in bucket), len(bucket)])
        for parameter, mean, share in zip(bucket, means, shares.tolist(), strict=True):
            parameter.grad = mean.reshape(parameter.shape) if share > 0.0 else None

    def gathered(self, item: T) -> list[T]:
        """Every process's item, in the order of ranks."""
        if self.size == 1:
            return [item]
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, item)
        return found  # pyright: ignore[reportReturnType] all are filled now

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process; it is called there only."""
        if self.size == 1:
            return make()
        box = [make() if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # pyright: ignore[reportReturnType]

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Each metric's mean over the processes that have it: those of the whole batch."""
        everybody = self.gathered(dict(metrics))
        values: dict[str, list[float]] = {}
        for one in everybody:
            for name, value in one.items():
                values.setdefault(name, []).append(value)
        return {name: sum(found) / len(found) for name, found in values.items()}

    def is_any(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return any(self.gathered(wish))

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of items that are dealt out in turn."""
        return list(items[self.rank :: self.size])

    def equalise(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by the main process's, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Make sure that all processes run the same thing.

        Args:
            facts: By name, short texts or digests.

        Raises:
            ConfigError: On every process, where one has other facts than the main one.
        """
        main, *others = self.gathered(dict(facts))
        for rank, other in enumerate(others, start=1):
            for name in main | other:
                if main.get(name) != other.get(name):
                    raise ConfigError(
                        f"process {rank} of {self.size} has {name} {other.get(name)}, process 0 "
                        f"has {main.get(name)}; start all of them with the same command on the "
                        "same files"
                    )


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one device and dtype, `BUCKET_NUMBERS` numbers or one parameter at a time."""
    bucket: list[nn.Parameter] = []
    total = 0
    for parameter in parameters:
        fits = total + parameter.numel() <= BUCKET_NUMBERS
        if bucket and not (fits and _are_alike(bucket[0], parameter)):
            yield bucket
            bucket, total = [], 0
        bucket.append(parameter)
        total += parameter.numel()
    if bucket:
        yield bucket


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def summed(values: Tensor) -> Tensor:
    """The sum of every process's values; the values themselves in one process."""
    if dist.is_available() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values
