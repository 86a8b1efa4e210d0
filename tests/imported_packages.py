"""What modules import, lazily too, and what a set of extras installs."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported_packages(module: str) -> dict[str, set[str]]:
    """Packages of others that a module of ours reaches, at import or inside a function.

    Imports for the type checker only do not count.

    Args:
        module: Where to begin; all modules of ours that it reaches are followed.

    Returns:
        Import name -> our modules that import it.
    """
    todo, seen, found = [module], set(), {}
    while todo:
        name = todo.pop()
        file = _file_of(name)
        if name in seen or file is None:
            continue
        seen.add(name)
        todo.append(name.rpartition(".")[0])
        for one in _imports(ast.parse(file.read_text(encoding="utf-8"))):
            top = one.partition(".")[0]
            if top == "fewstep":
                todo += [one, one.rpartition(".")[0]]  # "from a import b": b may be a module
            elif top not in sys.stdlib_module_names:
                found.setdefault(top, set()).add(name)
    return found


def brought_by(extras: Sequence[str]) -> set[str]:
    """Normalized names of all distributions that these extras install, on this machine."""
    todo, found = list(_requirements(extras)), set()
    while todo:
        wanted = todo.pop()
        key = (normalized(wanted.name), *sorted(wanted.extras))
        if key in found:
            continue
        found.add(key)
        lines = distribution(wanted.name).requires or []
        todo += [one for one in map(Requirement, lines) if _is_wanted(one, wanted.extras)]
    return {key[0] for key in found}


def distributions_of(package: str) -> set[str]:
    """Normalized names of the installed distributions that hold an import name."""
    return {normalized(name) for name in packages_distributions().get(package, ())}


def normalized(name: str) -> str:
    """A distribution's name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(extras: Sequence[str]) -> Iterator[Requirement]:
    yield from map(Requirement, PROJECT["dependencies"])
    for extra in extras:
        for one in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if one.name == "fewstep":
                yield from _requirements(sorted(one.extras))
            else:
                yield one


def _is_wanted(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras))


def _file_of(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split(".")) if module else ROOT
    files = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _imports(node)
