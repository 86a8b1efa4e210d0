"""Every graph against the network it was made from, before a folder is published."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from fewstep.errors import ExportError
from fewstep.export.checking.limits import NO_NUMBER, is_within
from fewstep.export.checking.parity import relative_difference
from fewstep.export.merging import MergedPipeline
from fewstep.export.part import Part
from fewstep.runtime.manifest import Manifest, Measured
from fewstep.runtime.onnx_session import OnnxLoader

LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2}
"""Largest difference, relative to the largest value. Measured: 5e-6 and 5e-3 on tiny networks."""


def check_graphs(
    merged: MergedPipeline,
    folder: Path,
    manifest: Manifest,
    *,
    force: bool,
    progress: Callable[[str], None],
) -> Manifest:
    """Run every graph at several sizes beside its network.

    Args:
        merged: Whose networks.
        folder: Where the graphs are.
        manifest: Of the folder.
        force: Whether a folder that fails is published all the same.
        progress: Told what is compared.

    Returns:
        The manifest with the figures, and whether all of them hold.

    Raises:
        ExportError: A graph differs too much, or gives NaN or infinity.
    """
    loader = OnnxLoader(folder, manifest.files, "cpu", has_cache=False)
    found: list[Measured] = []
    for part in merged.parts():
        progress(f"checking {part.name}")
        session = loader.load(manifest.graphs[part.name])
        for sizes in shapes(part):
            feeds = part.example(sizes, seed=1)
            with torch.no_grad():
                wanted = part.module.eval()(*feeds.values())
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            got = session.run({name: value.numpy() for name, value in feeds.items()})
            error = max(
                relative_difference(value.float().numpy(), got[port.name])
                for port, value in zip(part.outputs, wanted, strict=True)
            )
            where = ", ".join(f"{name} {size}" for name, size in sizes.items())
            limit = LIMITS[part.dtype]
            found.append(
                Measured(what=part.name, where=where, value=error, unit="relative", limit=limit)
            )
    return _verdict(manifest, found, force)


def _verdict(manifest: Manifest, found: list[Measured], force: bool) -> Manifest:
    bad = [m for m in found if not is_within(m)]
    if bad and not force:
        worst = max(bad, key=lambda m: m.value)
        if worst.value >= NO_NUMBER:
            raise ExportError(
                f"{worst.what} or its network gives NaN or infinity at {worst.where}; nothing was "
                "published (--force overrules)"
            )
        raise ExportError(
            f"{worst.what} differs from its network by {worst.value:.1e} relative at "
            f"{worst.where}, more than {worst.limit:g}; nothing was published (--force overrules)"
        )
    return dataclasses.replace(manifest, measured=(*manifest.measured, *found), verified=not bad)


def shapes(part: Part) -> list[dict[str, int]]:
    """The traced sizes, one picture of an odd aspect, and one at the smallest size."""
    step = {name: part.multiples.get(name, 1) for name in part.sizes}
    odd = {name: _odd(name, size, step[name]) for name, size in part.sizes.items()}
    small = {name: _small(name, size, step[name]) for name, size in part.sizes.items()}
    return [dict(part.sizes), odd, small]


def _odd(name: str, size: int, step: int) -> int:
    if name == "batch_size":
        return 1
    is_length = name == "sequence_length" or step == size
    return size if is_length else max(step, (size // step // 2 * 2 - 1) * step)


def _small(name: str, size: int, step: int) -> int:
    if name == "batch_size":
        return 3
    return size if name == "sequence_length" else min(size, 2 * step)
