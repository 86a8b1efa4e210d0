"""What kind of adapter a file is, and its tensors sorted by kind. From headers alone, no torch.

<component>.<module>.lora_A.weight ...         LoRA, and every other kind that hosts know
<component>.<module>.lorad_A.weight (out, r)   rotations of weight columns (LoRaD): theta = A B
<component>.<module>.lorad_B.weight (r, in / 2)
two_time.linear_1.weight ...                   a head that is told the target time
policy.means.weight ...                        a wider output layer: a policy (`policy_names`)
route.<name>.<any of the above>                one of several experts, for a group of prompts
route.<name>.centroid (width,)                 where that group is among prompt embeddings
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fewstep.adapters.header import AdapterHeader, TensorInfo
from fewstep.adapters.modules import LoraModule, lora_modules
from fewstep.adapters.names import TensorName, parse_name, shown
from fewstep.adapters.policy_names import policy_names
from fewstep.errors import AdapterError

AdapterKind = Literal["lora", "lorad", "two_time", "policy", "routes"]
ANGLES_A, ANGLES_B = ".lorad_A.weight", ".lorad_B.weight"
TWO_TIME = "two_time."
CENTROID = "centroid"
TWO_NETWORKS = ("transformer", "transformer_2")
NEEDS_KEY = "fewstep.needs"
"""Metadata of kinds that only fewstep reads: a sentence that says so, for people."""
_ROUTE = re.compile(r"route\.([A-Za-z0-9_-]{1,64})\.(.+)")
KIND_TEXTS: dict[AdapterKind, str] = {
    "lora": "LoRA",
    "lorad": "LoRaD (rotations of weight columns)",
    "two_time": "LoRA with a head that is told the target time",
    "policy": "LoRA with a policy head (a wider output layer)",
    "routes": "one adapter per group of prompts",
}


def needs_text(kind: AdapterKind) -> str:
    """What files of a kind say under `NEEDS_KEY`."""
    return f"{KIND_TEXTS[kind]}: only FewStepPipeline of fewstep applies all of it"


@dataclass(frozen=True, slots=True)
class Rotation:
    """One rotated layer: `weight` with its column pairs turned by A B.

    Attributes:
        name: Whose module it is; `part` is meaningless here.
        a: Info of A, (out, r).
        b: Info of B, (r, in / 2).
        a_name: Tensor name of A.
        b_name: Tensor name of B.
    """

    name: TensorName
    a: TensorInfo
    b: TensorInfo
    a_name: str
    b_name: str

    @property
    def rank(self) -> int:
        """Of the angles."""
        return self.b.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """A file's tensors by kind.

    Attributes:
        lora: The file with nothing but LoRA and what else every reader knows.
        rotations: Rotated layers, in the order of the header.
        two_time: Parameter of the head -> tensor name.
        policy: Parameter of the policy head -> tensor name.
        routes: Expert -> the file with nothing but its tensors, under plain names.
        centroids: Expert -> tensor name.
    """

    lora: AdapterHeader
    rotations: tuple[Rotation, ...] = ()
    two_time: dict[str, str] = field(default_factory=dict)
    policy: dict[str, str] = field(default_factory=dict)
    routes: dict[str, AdapterHeader] = field(default_factory=dict)
    centroids: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> AdapterKind:
        """The kind of the file as a whole."""
        if self.routes:
            return "routes"
        if self.policy:
            return "policy"
        return "two_time" if self.two_time else "lorad" if self.rotations else "lora"

    @property
    def kind_text(self) -> str:
        """The same for people, with the experts' names."""
        text = KIND_TEXTS[self.kind]
        if self.routes:
            text += f": {', '.join(sorted(self.routes))}"
        if (self.two_time or self.policy) and self.rotations:
            text = text.replace("LoRA", KIND_TEXTS["lorad"], 1)
        return text

    def rotations_on(self, component: str) -> tuple[Rotation, ...]:
        """The rotations for one component, where a file has layers of two networks."""
        if {rotation.name.component for rotation in self.rotations} == {*TWO_NETWORKS}:
            return tuple(r for r in self.rotations if r.name.component == component)
        return self.rotations

    def modules(self) -> tuple[LoraModule, ...]:
        """Every adapted layer of every expert; of a rotation B and A as down and up.

        Raises:
            AdapterError: A pair is not complete.
        """
        if self.routes:
            parts = (adapter_parts(header) for header in self.routes.values())
            return tuple(module for part in parts for module in part.modules())
        turned = (LoraModule(r.name, r.b, r.a, float(r.rank)) for r in self.rotations)
        return (*lora_modules(self.lora), *turned)


def adapter_parts(header: AdapterHeader) -> AdapterParts:
    """Sort the tensors of a file by kind.

    Raises:
        AdapterError: Half of a rotation is missing, kinds are mixed that cannot be applied
            together, or an expert has no centroid or no tensors.
    """
    plain: dict[str, TensorInfo] = {}
    angles: dict[str, TensorInfo] = {}
    two_time: dict[str, str] = {}
    policy = policy_names(header.tensors, header.metadata)
    of_policy = set(policy.values())
    routes: dict[str, dict[str, TensorInfo]] = {}
    centroids: dict[str, str] = {}
    for name, info in header.tensors.items():
        if match := _ROUTE.fullmatch(name):
            if match[2] == CENTROID:
                centroids[match[1]] = name
            else:
                routes.setdefault(match[1], {})[match[2]] = info
        elif name in of_policy:
            continue
        elif name.startswith(TWO_TIME):
            two_time[name.removeprefix(TWO_TIME)] = name
        elif name.endswith((ANGLES_A, ANGLES_B)):
            angles[name] = info
        else:
            plain[name] = info
    if routes or centroids:
        heads = dict.fromkeys((*two_time, *policy.values()))
        _check_routes(header, routes, centroids, {**plain, **angles, **heads})
    elif plain and angles:
        raise AdapterError(
            f"{header.path}: mixes rotations ({shown(next(iter(angles)))}) with other tensors "
            f"({shown(next(iter(plain)))}), whose order is not defined; save one kind only"
        )
    if policy and two_time:
        raise AdapterError(
            f"{header.path}: holds a policy head and a head that is told the target time, of which "
            "a network has one; save one kind only"
        )
    return AdapterParts(
        lora=replace(header, tensors=plain),
        rotations=tuple(_rotations(header, angles)),
        two_time=two_time,
        policy=policy,
        routes={name: replace(header, tensors=found) for name, found in routes.items()},
        centroids=centroids,
    )


def rotation_problem(rotation: Rotation, weight: tuple[int, ...] | None) -> str | None:
    """Why a rotation does not fit a weight of the base (None: not in it), or None."""
    if weight is None:
        return "is not in the base"
    if len(weight) != 2:
        return f"is no linear layer: the base weight is {list(weight)}"
    if weight[1] % 2:
        return f"has an odd number of inputs ({weight[1]}), whose columns make no pairs"
    if (rotation.a.shape[0], rotation.b.shape[1]) != (weight[0], weight[1] // 2):
        return (
            f"has A {list(rotation.a.shape)} and B {list(rotation.b.shape)}, the base weight is "
            f"{list(weight)}"
        )
    return None


def check_rotations(
    header: AdapterHeader,
    rotations: tuple[Rotation, ...],
    base_shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that every rotation fits a weight of the base.

    Args:
        header: The file, for messages.
        rotations: Its rotations.
        base_shapes: diffusers parameter name -> shape.

    Raises:
        AdapterError: One does not; the first offender is named.
    """
    offenders = [
        f"{shown(rotation.name.module)} {problem}"
        for rotation in rotations
        if (
            problem := rotation_problem(rotation, base_shapes.get(f"{rotation.name.module}.weight"))
        )
    ]
    if offenders:
        fitting = len(rotations) - len(offenders)
        raise AdapterError(
            f"{header.path}: {f'only {fitting}' if fitting else 'none'} of {len(rotations)} "
            f"rotated modules fit this base; the first that does not: {offenders[0]}; use an "
            "adapter made for this base"
        )


def _rotations(header: AdapterHeader, angles: Mapping[str, TensorInfo]) -> Iterator[Rotation]:
    bodies = dict.fromkeys(n.removesuffix(ANGLES_A).removesuffix(ANGLES_B) for n in angles)
    for body in bodies:
        a, b = angles.get(body + ANGLES_A), angles.get(body + ANGLES_B)
        if a is None or b is None:
            raise AdapterError(
                f"{header.path}: module {shown(body)} has no {'A' if a is None else 'B'} of its "
                "rotation; the file is incomplete, download or save it again"
            )
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[1] == b.shape[0] > 0:
            raise AdapterError(
                f"{header.path}: module {shown(body)} has lorad_A {list(a.shape)} and lorad_B "
                f"{list(b.shape)}; wanted (out, rank) and (rank, in / 2) of one rank"
            )
        name = parse_name(f"{body}.lora_A.weight")  # whose module it is, as of a LoRA
        yield Rotation(name, a, b, body + ANGLES_A, body + ANGLES_B)


def _check_routes(
    header: AdapterHeader,
    routes: Mapping[str, object],
    centroids: Mapping[str, str],
    others: Mapping[str, object],
) -> None:
    for name in sorted({*routes} ^ {*centroids}):
        missing = "centroid" if name in routes else "adapter tensors"
        raise AdapterError(
            f"{header.path}: route {name!r} has no {missing}; save the file again with all experts"
        )
    if others:
        raise AdapterError(
            f"{header.path}: holds experts of routes and beside them {shown(next(iter(others)))}, "
            "which is none of theirs; save it again with every tensor under its route"
        )
    widths = {header.tensors[name].shape for name in centroids.values()}
    if len(widths) > 1 or any(len(shape) != 1 for shape in widths):
        raise AdapterError(
            f"{header.path}: its centroids have the shapes {sorted(map(list, widths))}, wanted one "
            "vector (width,) per route; save the file again"
        )
