"""Where this fewstep lies, and which of its modules the nodes need.

The second is found by following imports from the nodes, those inside functions included, and is
written down nowhere: what a node starts to import tomorrow is carried tomorrow.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fewstep.errors import ConfigError

LIBRARY = "fewstep"
NODES = "fewstep.comfy_nodes"
DATA = {"fewstep.zoo": "entries/*.json"}
"""Files that modules read beside themselves: package -> pattern."""


@dataclass(frozen=True, slots=True)
class Source:
    """The fewstep to copy from, in a checkout or installed.

    Attributes:
        library: Folder of `fewstep`.
        nodes: Folder of `fewstep.comfy_nodes`, links resolved.
    """

    library: Path
    nodes: Path

    @property
    def is_checkout(self) -> bool:
        """Whether the node folder lies beside the library, as a linked one must."""
        return (self.nodes.parent / LIBRARY / "recipe.py").is_file()

    def file_of(self, module: str) -> Path | None:
        """The file a module of fewstep is read from, or None where there is no such module."""
        if not _is_within(module, LIBRARY):
            return None
        home, top = (self.nodes, NODES) if _is_within(module, NODES) else (self.library, LIBRARY)
        path = home.joinpath(*module.removeprefix(top).strip(".").split("."))
        files = (path / "__init__.py", path.with_suffix(".py"))
        return next((file for file in files if file.is_file()), None)


def find_source() -> Source:
    """Where the fewstep that runs lies.

    Raises:
        ConfigError: It comes without the nodes.
    """
    spec = find_spec(NODES)  # finds, does not import
    if spec is None or spec.origin is None:
        raise ConfigError("this fewstep comes without its ComfyUI nodes; install it again with pip")
    return Source(Path(__file__).resolve().parents[1], Path(spec.origin).resolve().parent)


def node_modules(source: Source) -> list[str]:
    """The modules of the node folder."""
    names = sorted(file.stem for file in source.nodes.glob("*.py"))
    return [NODES, *(f"{NODES}.{name}" for name in names if name != "__init__")]


def needed_modules(source: Source) -> dict[str, Path]:
    """Every module of fewstep that the nodes can come to import, and its file.

    Raises:
        ConfigError: An import names a module of fewstep that is not there.
    """
    found: dict[str, Path] = {}
    waiting = node_modules(source)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        file = source.file_of(module)
        if file is None:
            raise ConfigError(f"the nodes import {module}, which this fewstep does not have")
        found[module] = file
        names = imports_of(file)
        waiting += [name for name in names.modules if _is_within(name, LIBRARY)]
        waiting += [name for name in names.members if source.file_of(name) is not None]
        waiting.append(module.rpartition(".")[0] or LIBRARY)  # its package is imported before it
    return dict(sorted(found.items()))


def carried_files(source: Source) -> dict[str, Path]:
    """What a pack carries of fewstep: "fewstep/recipe.py" -> the file to copy."""
    files: dict[str, Path] = {}
    for module, file in needed_modules(source).items():
        folder = module if file.name == "__init__.py" else module.rpartition(".")[0]
        files[f"{folder.replace('.', '/')}/{file.name}"] = file
        for data in sorted(file.parent.glob(DATA[module])) if module in DATA else ():
            files[f"{folder.replace('.', '/')}/{data.relative_to(file.parent).as_posix()}"] = data
    return files


@dataclass(frozen=True, slots=True)
class Imports:
    """Names that a file imports when it runs, those for type checkers left out.

    Attributes:
        modules: "a.b" of `import a.b` and of `from a.b import c`.
        members: "a.b.c" of the latter: a module too, or something in one.
    """

    modules: frozenset[str]
    members: frozenset[str]


def imports_of(file: Path) -> Imports:
    """What a file imports, at its start or anywhere later."""
    modules: set[str] = set()
    members: set[str] = set()
    for node in _statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            members |= {f"{node.module}.{alias.name}" for alias in node.names}
    return Imports(frozenset(modules), frozenset(members))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")
