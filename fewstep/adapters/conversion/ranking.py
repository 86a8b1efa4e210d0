"""Fewer ranks by truncated singular value decomposition, with the error that it costs.

The best rank-R approximation of a delta in the Frobenius norm is its first R singular triples
(Eckart and Young 1936). Errors are measured on what is stored, rounding included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING

from fewstep.adapters.conversion.converted import DOWN, MAGNITUDE, UP, ConvertedAdapter
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch

OVERSAMPLING, ITERATIONS = 32, 6
"""Of the randomised method (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4)."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ModuleError:
    """What re-ranking cost one module.

    Attributes:
        module: Its diffusers name.
        rank: What it has now.
        norm: Frobenius norm of its delta before, alpha applied.
        error: Of the difference to what is stored now.
    """

    module: str
    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """error / norm; 0 for a delta of zero."""
        return self.error / self.norm if self.norm else 0.0


def total_error(errors: Sequence[ModuleError]) -> float:
    """Relative Frobenius error of all modules together."""
    norm = sqrt(sum(error.norm**2 for error in errors))
    return sqrt(sum(error.error**2 for error in errors)) / norm if norm else 0.0


def to_rank(
    adapter: ConvertedAdapter, rank: int, progress: Progress | None = None
) -> tuple[ConvertedAdapter, tuple[ModuleError, ...]]:
    """Every module at this rank or below, whole deltas of weights included; alpha equals rank then.

    Modules that have no more than this rank already stay exactly what they are. Deltas of biases
    stay; deltas of vectors (norms) cannot be LoRA.

    Args:
        adapter: What `convert_to_diffusers` gave.
        rank: At least 1.
        progress: Called with (modules done, modules in all).

    Raises:
        AdapterError: A module is DoRA, whose norms belong to the delta as it is.
    """
    deltas = {
        name.removesuffix(".weight"): delta
        for name, delta in adapter.extras.items()
        if name.endswith(".weight") and delta.ndim >= 2
    }
    modules = list(dict.fromkeys([*adapter.ranks, *deltas]))
    tensors, alphas, ranks = dict(adapter.tensors), dict(adapter.alphas), dict(adapter.ranks)
    errors = []
    for done, module in enumerate(modules):
        if progress:
            progress(done, len(modules))
        if module + MAGNITUDE in tensors:
            raise AdapterError(
                f"{adapter.header.path}: {module} is DoRA, whose norms fit its own delta only; "
                "convert it without a rank"
            )
        if module in deltas:
            error = _delta_module(adapter, module, deltas[module], rank, tensors)
        else:
            error = _lora_module(adapter, module, rank, tensors)
        errors.append(error)
        if module in deltas or error.rank != ranks[module]:
            ranks[module], alphas[module] = error.rank, float(error.rank)
    extras = {n: v for n, v in adapter.extras.items() if n.removesuffix(".weight") not in deltas}
    coverage = replace(adapter.coverage, ranks=ranks, alphas=alphas)
    changed = replace(
        adapter, tensors=tensors, alphas=alphas, ranks=ranks, extras=extras, coverage=coverage
    )
    return changed, tuple(errors)


def _lora_module(
    adapter: ConvertedAdapter, module: str, rank: int, tensors: "dict[str, torch.Tensor]"
) -> ModuleError:
    down, up = tensors[module + DOWN], tensors[module + UP]
    old_rank = adapter.ranks[module]
    flat_down = down.flatten(1).double()
    flat_up = up.flatten(1).double() * (adapter.alphas[module] / old_rank)
    norm = _product_norm(flat_up, flat_down)
    if old_rank <= rank:
        return ModuleError(module, old_rank, norm, 0.0)
    new_up, new_down = truncated_product(flat_up, flat_down, rank)
    new_up, new_down = new_up.to(up.dtype), new_down.to(down.dtype)
    error = _product_norm(*_difference(flat_up, flat_down, new_up.double(), new_down.double()))
    tensors[module + DOWN] = new_down.reshape(-1, *down.shape[1:])
    tensors[module + UP] = new_up.reshape(*new_up.shape, *up.shape[2:])
    return ModuleError(module, new_down.shape[0], norm, error)


def _delta_module(
    adapter: ConvertedAdapter,
    module: str,
    delta: "torch.Tensor",
    rank: int,
    tensors: "dict[str, torch.Tensor]",
) -> ModuleError:
    flat = delta.flatten(1).float()
    if module in adapter.ranks:  # the file has both for this layer
        up, down = (tensors[module + end].flatten(1).float() for end in (UP, DOWN))
        flat = flat + up @ down * (adapter.alphas[module] / adapter.ranks[module])
    new_up, new_down = truncated(flat, rank)
    new_up, new_down = new_up.to(delta.dtype), new_down.to(delta.dtype)
    error = float((flat - new_up.float() @ new_down.float()).norm())
    tensors[module + DOWN] = new_down.reshape(-1, *delta.shape[1:])
    tensors[module + UP] = new_up.reshape(*new_up.shape, *(1,) * (delta.ndim - 2))
    return ModuleError(module, new_down.shape[0], float(flat.norm()), error)


def truncated_product(
    up: "torch.Tensor", down: "torch.Tensor", rank: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """The best rank-R factors of up @ down, without ever making the product.

    Args:
        up: (out, r), down: (r, in).
        down: See above.
        rank: R < r.
    """
    import torch

    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(left_core @ right_core.T)
    root = s[:rank].sqrt()
    return left @ u[:, :rank] * root, (right @ v[:rank].T * root).T.contiguous()


def truncated(delta: "torch.Tensor", rank: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """Rank-R factors (out, R) and (R, in) of a matrix: exact for small ones, else randomised."""
    import torch

    rank = min(rank, *delta.shape)
    width = rank + OVERSAMPLING
    if 4 * width >= min(delta.shape):
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        basis = delta @ torch.randn(delta.shape[1], width, generator=generator)
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(basis).Q
            basis = delta @ torch.linalg.qr(delta.T @ basis).Q
        basis = torch.linalg.qr(basis).Q
        u, s, v = torch.linalg.svd(basis.T @ delta, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:rank].T * root).T.contiguous()


def _difference(
    up: "torch.Tensor", down: "torch.Tensor", new_up: "torch.Tensor", new_down: "torch.Tensor"
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Factors of the difference of two products."""
    import torch

    return torch.cat([up, -new_up], dim=1), torch.cat([down, new_down])


def _product_norm(up: "torch.Tensor", down: "torch.Tensor") -> float:
    """Frobenius norm of up @ down from its factors: |R_up R_down^T|, with QR for accuracy."""
    import torch

    left, right = torch.linalg.qr(up).R, torch.linalg.qr(down.T).R
    return float((left @ right.T).norm())
