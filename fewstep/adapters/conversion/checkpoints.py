"""The difference between a full-weight student and its base, as an adapter to be re-ranked."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.adapters.base_shapes import DENOISERS, INDEX_SUFFIX
from fewstep.adapters.conversion.converted import ConvertedAdapter
from fewstep.adapters.conversion.fused import swapped
from fewstep.adapters.conversion.name_index import NameIndex
from fewstep.adapters.conversion.parts import split_name
from fewstep.adapters.conversion.tensor_reading import open_tensors
from fewstep.adapters.coverage import Coverage
from fewstep.adapters.header import AdapterHeader, read_header
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError

if TYPE_CHECKING:
    import torch

OTHER_COMPONENTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_enc")
"""How names of the VAE and the text encoders begin in files of whole pipelines; they stay out."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """A student less its base.

    Attributes:
        adapter: Whole deltas of weights and biases in `extras`.
        changes: Parameter -> size of the change relative to the parameter, of everything but
            matrices: what is not in `extras` (norms, tables) no LoRA can change.
    """

    adapter: ConvertedAdapter
    changes: dict[str, float]

    def without_biases(self) -> "Difference":
        """The same with weights only, for hosts that cannot hold bias deltas."""
        extras = {n: v for n, v in self.adapter.extras.items() if n.endswith(".weight")}
        return replace(self, adapter=replace(self.adapter, extras=extras))

    @property
    def left_out(self) -> dict[str, float]:
        """What changed and is not in the adapter."""
        return {n: c for n, c in self.changes.items() if n not in self.adapter.extras}


class Weights:
    """The tensors of a model, in one file or several, read one at a time.

    Args:
        headers: Its files.
    """

    def __init__(self, headers: Iterable[AdapterHeader]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read = {}
        for header in headers:
            read = open_tensors(header)
            for name, info in header.tensors.items():
                self.shapes[name] = info.shape
                self._read[name] = read

    def read(self, name: str) -> "torch.Tensor":
        """One tensor."""
        return self._read[name](name)


def is_full_checkpoint(header: AdapterHeader) -> bool:
    """Whether a file holds weights of a model rather than an adapter."""
    parts = [split_name(name)[1] for name in header.tensors]
    return bool(parts) and parts.count("unknown") > len(parts) / 2


def denoiser_weights(folder: Path) -> tuple[str, Weights]:
    """Component name and weights of a pipeline's denoiser, or of a folder that is just that.

    Raises:
        AdapterError: No safetensors weights there.
    """
    component = next((name for name in DENOISERS if (folder / name).is_dir()), None)
    place = folder / component if component else folder
    return component or "", Weights([read_header(path) for path in _files(place)])


def _files(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"), key=lambda p: (len(p.name), p.name))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(
                f"{indexes[0]}: not a safetensors index; download it again"
            ) from error
        return [folder / Path(name).name for name in sorted(map(str, names))]
    singles = sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name))
    if not singles:
        raise AdapterError(
            f"{folder}: no .safetensors weights here; give the folder of a diffusers model"
        )
    return singles[:1]


def difference(
    header: AdapterHeader,
    student: Weights,
    base: Weights,
    *,
    component: str,
    family: str | None,
    progress: Progress | None = None,
) -> Difference:
    """Student minus base, parameter by parameter; names of the student may be native.

    Args:
        header: The student's file, or its first.
        student: Its weights.
        base: The base's, diffusers names.
        component: Where the adapter will go.
        family: Base family.
        progress: Called with (tensors done, tensors in all).

    Raises:
        AdapterError: A tensor of the student has no place in the base, or all are equal.
    """
    index = NameIndex(family, base.shapes)
    extras: dict[str, torch.Tensor] = {}
    changes: dict[str, float] = {}
    for done, name in enumerate(student.shapes):
        if progress:
            progress(done, len(student.shapes))
        if name.startswith(OTHER_COMPONENTS):
            continue
        for parameter, values in _in_diffusers(header, name, student, index, base.shapes):
            old = base.read(parameter).float()
            delta = values.float() - old
            if not bool(delta.any()):
                continue
            if parameter.endswith((".weight", ".bias")):
                extras[parameter] = delta
            if not parameter.endswith(".weight") or delta.ndim < 2:
                changes[parameter] = float(delta.norm() / old.norm().clamp_min(1e-12))
    # A vector alone has no LoRA to ride on: norms, tables, biases of layers that did not change.
    matrices = {name for name, delta in extras.items() if delta.ndim >= 2}
    extras = {
        name: delta
        for name, delta in extras.items()
        if name in matrices or (name.endswith(".bias") and f"{name[:-5]}.weight" in matrices)
    }
    if not extras:
        raise AdapterError(
            f"{header.path}: is equal to the base in every matrix; give a student that was trained"
        )
    modules = {name.rpartition(".")[0] for name in extras}
    coverage = Coverage(matched=len(modules), modules=len(modules), ranks={}, alphas={})
    adapter = ConvertedAdapter(
        header, component, {}, {}, {}, {}, {}, extras, coverage, family=family
    )
    return Difference(adapter, changes)


def _in_diffusers(
    header: AdapterHeader,
    name: str,
    student: Weights,
    index: NameIndex,
    base_shapes: Mapping[str, tuple[int, ...]],
) -> "list[tuple[str, torch.Tensor]]":
    """One tensor of the student as parameters of the base."""
    module, _, kind = name.rpartition(".")
    plain = next((n for n in _stripped(name) if n in base_shapes), None)
    if plain is not None and base_shapes[plain] == student.shapes[name]:
        return [(plain, student.read(name))]
    target = index.find(module) if kind in ("weight", "bias") else None
    if target is None or sum(target.rows) != student.shapes[name][0]:
        raise AdapterError(
            f"{header.path}: {shown(name)} {list(student.shapes[name])} has no place in the base; "
            "give the base this student was trained from"
        )
    values = student.read(name)
    if target.swaps:
        values = swapped(values)
    parts = zip(target.parts, values.split(list(target.rows)), strict=True)
    return [(f"{part}.{kind}", rows.reshape(base_shapes[f"{part}.{kind}"])) for part, rows in parts]


def _stripped(name: str) -> Iterable[str]:
    yield name
    for prefix in ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model."):
        yield name.removeprefix(prefix)
