"""The folders, the package list and the import arrows agree."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPING: dict[str, str] = CONFIG["tool"]["setuptools"]["package-dir"]
ARROWS: dict[str, set[str]] = {  # folder -> folders it may import from
    "fewstep": set(),
    "export": {"fewstep"},
    "trainer": {"fewstep"},
    "comfy_nodes": {"fewstep"},
}
STARTS = {
    "fewstep/cli/main.py": {"trainer", "export"},
    "fewstep/cli/demo.py": {"trainer"},
}
"""The verbs that run another room; they import it when they run."""

TORCH_FREE = [
    "fewstep/*.py",
    "fewstep/adapters/**/*.py",
    "fewstep/cli/**/*.py",
    "fewstep/runtime/**/*.py",
    "fewstep/zoo/**/*.py",
    "export/__init__.py",
    "comfy_nodes/__init__.py",
]
"""Files whose import must not cost a torch import."""
USES_TORCH = {"fewstep/loading.py", "fewstep/toy.py"}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate"}
HOMES = {  # outside library -> the places that may import it
    "diffusers": [
        *("fewstep/schedulers", "fewstep/pipeline", "fewstep/loading", "fewstep/digits"),
        *("fewstep/adapters/conversion", "fewstep/doctor", "fewstep/solvers", "trainer", "export"),
        "fewstep/heads",
    ],
    "accelerate": ["trainer"],
    "peft": ["trainer", "fewstep/pipeline"],
    "onnx": ["export", "fewstep/runtime"],
    "onnxruntime": ["export", "fewstep/runtime"],
    "tensorrt": ["export", "fewstep/runtime"],
    "fastapi": ["fewstep/serve"],
    **dict.fromkeys(("comfy", "comfy_api", "folder_paths"), ["comfy_nodes"]),
    "tyro": ["fewstep/cli", "trainer", "export", "fewstep/digits"],
}


def files(room: str) -> list[Path]:
    """Python files that really live in the folder, links not followed."""
    home = ROOT / room
    return sorted(f for f in home.rglob("*.py") if f.resolve().is_relative_to(home))


def all_files() -> list[Path]:
    return [file for room in ARROWS for file in files(room)]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room_of(module: str) -> str | None:
    """`fewstep.trainer.loop` -> `trainer`; `fewstep.recipe` -> `fewstep`; others -> None."""
    top, _, rest = module.partition(".")
    if top != "fewstep":
        return None
    second = rest.partition(".")[0]
    return second if second in ARROWS else "fewstep"


def folder_of(package: str) -> Path:
    """`fewstep.trainer.methods` -> `trainer/methods`, links not followed."""
    for name, folder in MAPPING.items():
        if package == name or package.startswith(f"{name}."):
            return ROOT / folder / package.removeprefix(name).replace(".", "/").strip("/")
    return ROOT / package.replace(".", "/")


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(nodes: list[ast.stmt], *, inside_functions: bool) -> set[str]:
    """Modules imported by these statements, `if TYPE_CHECKING` left out."""
    found: set[str] = set()
    waiting: list[ast.AST] = [node for node in nodes if not is_type_checking(node)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if inside_functions or not is_function:
            waiting += [
                child
                for child in ast.iter_child_nodes(node)
                if not (isinstance(child, ast.stmt) and is_type_checking(child))
            ]
    return found


def imports(file: Path, *, inside_functions: bool = True) -> set[str]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return imported(body, inside_functions=inside_functions)


def is_under(name: str, places: list[str]) -> bool:
    return any(name == f"{place}.py" or name.startswith(f"{place}/") for place in places)


def packages_in_tree() -> set[str]:
    found: set[str] = set()
    for room in ARROWS:
        prefix = "fewstep" if room == "fewstep" else f"fewstep.{room}"
        for file in files(room):
            found.add(".".join([prefix, *file.parent.relative_to(ROOT / room).parts]))
    return found


def test_the_package_list_is_the_tree() -> None:
    listed = CONFIG["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_in_tree())


def test_every_package_has_an_init() -> None:
    without = [name_of(f.parent) for f in all_files() if not (f.parent / "__init__.py").exists()]
    assert without == []


def test_every_data_file_is_shipped() -> None:
    shipped: set[Path] = set()
    data: set[Path] = set()
    patterns = CONFIG["tool"]["setuptools"]["package-data"]
    for package in packages_in_tree():
        folder = folder_of(package)
        for pattern in [*patterns["*"], *patterns.get(package, [])]:
            shipped |= set(folder.glob(pattern))
    for room in ARROWS:
        home = ROOT / room
        found = (f for f in home.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc"))
        data |= {f for f in found if f.resolve().is_relative_to(home)}
    data -= {ROOT / name.replace(".", "/") for name in MAPPING}  # links as text files (Windows)
    assert {name_of(f) for f in data - shipped} == set()


def test_the_links_show_the_mapping() -> None:
    for name, folder in MAPPING.items():
        link = ROOT / name.replace(".", "/")
        if link.is_symlink():
            assert link.resolve() == ROOT / folder
        else:  # a checkout without symlinks holds the target as text
            assert link.read_text(encoding="utf-8") == f"../{folder}"


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_follow_the_arrows(room: str) -> None:
    for file in files(room):
        allowed = {None, room, *ARROWS[room]}
        allowed |= STARTS.get(name_of(file), set())
        wrong = {m for m in imports(file) if room_of(m) not in allowed}
        assert wrong == set(), f"{name_of(file)}: {room} must not import {wrong}"


def test_importing_the_library_does_not_import_another_room() -> None:
    for file in files("fewstep"):
        found = imports(file, inside_functions=False)
        assert {m for m in found if room_of(m) in STARTS["fewstep/cli/main.py"]} == set(), file


@pytest.mark.parametrize("pattern", TORCH_FREE)
def test_light_modules_do_not_import_torch(pattern: str) -> None:
    for file in ROOT.glob(pattern):
        if name_of(file) not in USES_TORCH:
            tops = {m.partition(".")[0] for m in imports(file, inside_functions=False)}
            assert tops & HEAVY == set(), name_of(file)


def test_the_runtime_never_imports_torch_not_even_later() -> None:
    for file in (ROOT / "fewstep/runtime").rglob("*.py"):
        assert {m.partition(".")[0] for m in imports(file)} & HEAVY == set(), name_of(file)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("fewstep/schedulers", "fewstep.pipeline"),
        ("fewstep/loading", "fewstep.pipeline"),
        ("fewstep/runtime", "fewstep.pipeline"),
        ("fewstep/runtime", "fewstep.serve"),
        ("fewstep/pipeline", "fewstep.serve"),
        ("fewstep/adapters", "fewstep.pipeline"),
        ("fewstep/heads", "fewstep.pipeline"),
        ("fewstep/heads", "fewstep.adapters"),
        ("fewstep/adapters", "fewstep.schedulers"),
        ("fewstep/metrics", "fewstep.pipeline"),
        ("fewstep/metrics", "fewstep.digits"),
        ("fewstep/recipe", "fewstep.adapters"),
        ("fewstep/sampling", "fewstep.recipe"),
        ("fewstep/noise_schedule", "fewstep.sampling"),
        ("fewstep/noise", "fewstep.sampling"),
        ("fewstep/adapters", "fewstep.comfy_install"),
        ("fewstep/runtime", "fewstep.comfy_install"),
    ],
)
def test_lower_modules_do_not_import_upper_ones(lower: str, upper: str) -> None:
    for file in all_files():
        if is_under(name_of(file), [lower]):
            wrong = {m for m in imports(file) if f"{m}.".startswith(f"{upper}.")}
            assert wrong == set(), f"{name_of(file)} must not import {wrong}"


@pytest.mark.parametrize("library", HOMES)
def test_outside_libraries_have_one_home(library: str) -> None:
    for file in all_files():
        if not is_under(name_of(file), HOMES[library]):
            tops = {m.partition(".")[0] for m in imports(file)}
            assert library not in tops, f"{name_of(file)} must not import {library}"


def test_the_guard_sees_imports_where_they_hide() -> None:
    code = """
if TYPE_CHECKING:
    import a
try:
    import b.c
except ImportError:
    from d import e
def f():
    import g
class H:
    from i import j
"""
    body = ast.parse(code).body
    assert imported(body, inside_functions=False) == {"b.c", "d.e", "i.j"}
    assert imported(body, inside_functions=True) == {"b.c", "d.e", "g", "i.j"}
