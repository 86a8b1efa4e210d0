"""Optimisation profiles from ranges of symbols, and whether a profile agrees with its graph."""

from collections.abc import Mapping

from fewstep.errors import ExportError
from fewstep.export.tensorrt.sizes import SizeRange
from fewstep.runtime.manifest import Graph
from fewstep.runtime.tensorrt.identity import InputRange, Profile

OPERATIONS = {"*": lambda a, b: a * b, "/": lambda a, b: a // b, "+": lambda a, b: a + b}


def dim_value(dim: str, sizes: Mapping[str, int]) -> int:
    """Value of "77", "height" or "height * 8".

    Raises:
        ExportError: It is none of these, or names an unknown symbol.
    """
    parts = dim.split()
    if len(parts) == 1 and dim.isdigit():
        return int(dim)
    if parts and parts[0] in sizes:
        if len(parts) == 1:
            return sizes[dim]
        if len(parts) == 3 and parts[1] in OPERATIONS and parts[2].isdigit():
            return OPERATIONS[parts[1]](sizes[parts[0]], int(parts[2]))
    raise ExportError(f"a dim is {dim!r}, wanted a number, a symbol or `symbol * number`")


def make_profile(graph: Graph, ranges: Mapping[str, SizeRange]) -> Profile:
    """One profile in which every input may take any size of its symbols' ranges."""
    smallest = {symbol: r.min for symbol, r in ranges.items()}
    usual = {symbol: r.opt for symbol, r in ranges.items()}
    largest = {symbol: r.max for symbol, r in ranges.items()}
    return Profile(
        ranges=tuple(
            InputRange(
                name=tensor.name,
                min=tuple(dim_value(dim, smallest) for dim in tensor.dims),
                opt=tuple(dim_value(dim, usual) for dim in tensor.dims),
                max=tuple(dim_value(dim, largest) for dim in tensor.dims),
            )
            for tensor in graph.inputs
        )
    )


def profile_problems(graph: Graph, profile: Profile) -> list[str]:
    """What in a profile contradicts its graph.

    Returns:
        One text per contradiction: inputs missing or unknown, ranks, min <= opt <= max, fixed
        sizes changed, one symbol with two values, values that are not divisible.
    """
    ranges = {entry.name: entry for entry in profile.ranges}
    names = [tensor.name for tensor in graph.inputs]
    problems = [f"no range for {name}" for name in names if name not in ranges]
    problems += [f"{name} is no input" for name in ranges if name not in names]
    seen: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for tensor in graph.inputs:
        entry = ranges.get(tensor.name)
        if entry is None:
            continue
        if not len(tensor.dims) == len(entry.min) == len(entry.opt) == len(entry.max):
            problems.append(f"{tensor.name} has {len(tensor.dims)} axes")
            continue
        for axis, dim in enumerate(tensor.dims):
            values = (entry.min[axis], entry.opt[axis], entry.max[axis])
            problems += _axis_problems(graph, f"{tensor.name} axis {axis}", dim, values, seen)
    return problems


def _axis_problems(
    graph: Graph,
    where: str,
    dim: str,
    values: tuple[int, int, int],
    seen: dict[str, tuple[str, tuple[int, int, int]]],
) -> list[str]:
    text = ":".join(str(value) for value in values)
    if not values[0] <= values[1] <= values[2]:
        return [f"{where} is {text}, not ascending"]
    if dim.isdigit():
        return [] if set(values) == {int(dim)} else [f"{where} is {text}, the graph has {dim}"]
    first, known = seen.setdefault(dim, (where, values))
    if known != values:
        return [f"{where} is {text} and {first} is another range of the same symbol {dim}"]
    multiple = graph.multiples.get(dim, 1)
    if any(value % multiple for value in values):
        return [f"{where} is {text}, not divisible by {multiple}"]
    return []
