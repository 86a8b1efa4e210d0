"""The pack as it is published: whole, identical to its source, alone able to run, and clean."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from fewstep import __version__
from fewstep.comfy_install import Source, find_source, pack_files, write_pack
from fewstep.comfy_install.checking import LEAST_COMFYUI, LEAST_PYTHON
from fewstep.comfy_install.installed import MARKER, NAME
from fewstep.comfy_install.source import needed_modules
from fewstep.errors import ConfigError
from tests.comfy_pack.scanning import findings, in_code
from tests.test_layout import ROOT, folder_of, imported, imports

OF_COMFYUI = {
    *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview"),
    *("node_helpers", "nodes", "server"),
    *("numpy", "PIL", "safetensors", "tokenizers", "torch", "transformers", "tqdm"),
}
"""What a ComfyUI without any pack can import, beside the standard library."""
ENGINES = {
    "fewstep.runtime.onnx_session": "onnxruntime",
    "fewstep.runtime.openvino_session": "openvino",
}
"""Modules that are imported when an engine of their kind is opened, and need it."""
NEVER = {
    *("cli", "comfy_install", "digits", "doctor", "export", "heads", "loading", "metrics"),
    *("model_files", "pipeline", "schedulers", "serve", "solvers", "toy", "trainer"),
}
EXPLAINED = {
    ("carried/fewstep/adapters/opening.py", "imports huggingface_hub"): (
        "asks where its cache folder is; ComfyUI has it through transformers; nothing is downloaded"
    ),
    ("carried/fewstep/runtime/cache_folder.py", "uses os.environ"): (
        "reads, never writes: where a platform keeps caches, and FEWSTEP_CACHE"
    ),
    ("carried/fewstep/runtime/cache_folder.py", "environment"): "the same, as text",
    ("carried/fewstep/runtime/tensorrt/library.py", "import by name"): (
        "an optional package by its fixed name, when an engine is opened"
    ),
}
"""What a strict scan finds, and why it is there."""
ALONE = """
import importlib, json, sys
from pathlib import Path

carried = Path(sys.argv[1])
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
sys.path[:] = [str(carried), *(one for one in sys.path if not (Path(one) / "fewstep").exists())]
for heavy in ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "tensorrt", "tyro"):
    sys.modules[heavy] = None
done, missing = [], {}
for file in sorted(carried.rglob("*.py")):
    parts = file.relative_to(carried).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    try:
        importlib.import_module(name)
        done.append(name)
    except ModuleNotFoundError as error:
        missing[name] = (error.name or "").partition(".")[0]
from fewstep.zoo import entries
ours = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "fewstep"]
print(json.dumps({"done": done, "missing": missing, "files": ours, "entries": len(entries())}))
"""
FOUND = """
import importlib.metadata, importlib.util, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one).lower()]
sys.path[:] = [one for one in sys.path if not (Path(one) / "fewstep").exists()]
def version(name):
    if sys.argv[2] == "none":
        raise importlib.metadata.PackageNotFoundError(name)
    return sys.argv[2]
importlib.metadata.version = version
spec = importlib.util.spec_from_file_location("a.name.of/ComfyUI's", folder / "__init__.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.find_fewstep(folder)
import fewstep.recipe
print(fewstep.recipe.__file__)
"""


@pytest.fixture(scope="module")
def source() -> Source:
    return find_source()


@pytest.fixture(scope="module")
def pack(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / NAME
    write_pack(pack_files(source), folder)
    return folder


def carried_of(pack: Path) -> list[Path]:
    return sorted((pack / "carried").rglob("*.py"))


def module_of(pack: Path, file: Path) -> str:
    parts = file.relative_to(pack / "carried").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def python(code: str, *argv: str) -> str:
    command = [sys.executable, "-I", "-B", "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_carried_file_is_the_source_byte_by_byte(pack: Path) -> None:
    files = [file for file in (pack / "carried").rglob("*") if file.is_file()]
    assert len(files) > 50
    for file in files:
        package = ".".join(file.parent.relative_to(pack / "carried").parts)
        assert file.read_bytes() == (folder_of(package) / file.name).read_bytes(), file


def test_own_files_are_the_source_byte_by_byte(pack: Path) -> None:
    own = [file for file in pack.rglob("*") if file.is_file() and "carried" not in file.parts]
    for file in own:
        assert file.read_bytes() == (ROOT / "comfy_nodes" / file.relative_to(pack)).read_bytes()
    names = {file.relative_to(pack).parts[0] for file in own}
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE", "icon.png"} <= names
    assert {name for name in names if name.endswith(".py")} == {"__init__.py"}


def test_every_file_beside_the_nodes_is_in_the_pack(pack: Path) -> None:
    home = ROOT / "comfy_nodes"
    files = (f for f in home.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    for file in files:
        inside = file.relative_to(home)
        carried = pack / "carried/fewstep/comfy_nodes" / inside
        assert (pack / inside).is_file() or carried.is_file(), inside


def test_the_pack_is_closed_under_imports(pack: Path) -> None:
    carried = {module_of(pack, file) for file in carried_of(pack)}
    for file in carried_of(pack):
        for name in imports(file):
            if name.partition(".")[0] == "fewstep":
                parent = name.rpartition(".")[0]
                assert name in carried or parent in carried, f"{file} imports {name}"
                is_module = (
                    folder_of(name).with_suffix(".py").is_file()
                    or (folder_of(name) / "__init__.py").is_file()
                )
                assert name in carried or not is_module, f"{file} imports {name}"


def test_the_pack_carries_no_other_room(pack: Path) -> None:
    seconds = {(*module_of(pack, file).split("."), "")[1] for file in carried_of(pack)}
    assert seconds & NEVER == set()
    assert seconds >= {"comfy_nodes", "recipe", "sampling", "zoo", "errors"}


def test_importing_it_needs_only_what_comfyui_has(pack: Path) -> None:
    known = OF_COMFYUI | sys.stdlib_module_names | {"fewstep"}
    for file in carried_of(pack):
        tops = {name.partition(".")[0] for name in imports(file, inside_functions=False)}
        tops -= {ENGINES.get(module_of(pack, file))}
        assert tops <= known, f"{file}: {tops - known}"


def test_the_carried_copy_runs_alone(pack: Path, source: Source) -> None:
    said = json.loads(python(ALONE, str(pack / "carried")))
    assert all(Path(file).is_relative_to(pack) for file in said["files"])
    assert said["entries"] == len(list((source.library / "zoo/entries").glob("*.json")))
    outside = {name: what for name, what in said["missing"].items() if "comfy_nodes" not in name}
    assert outside == ENGINES
    assert set(said["missing"].values()) <= {*OF_COMFYUI, *ENGINES.values()}
    assert {"fewstep.recipe", "fewstep.zoo", "fewstep.comfy_nodes"} <= set(said["done"])


@pytest.mark.parametrize("installed", ["none", "0.0.1", __version__])
def test_an_installed_pack_uses_its_own_fewstep(pack: Path, installed: str) -> None:
    """None is there, one of another release, or a card of this release without a package."""
    assert Path(python(FOUND, str(pack), installed).strip()).is_relative_to(pack)


def test_a_missing_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "fewstep").mkdir()
    (tmp_path / "fewstep" / "__init__.py").touch()
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "__init__.py").write_text("def f():\n    from fewstep.gone import x\n")
    with pytest.raises(ConfigError, match=r"the nodes import fewstep\.gone, which"):
        needed_modules(Source(tmp_path / "fewstep", tmp_path / "nodes"))


def test_lazy_imports_are_followed_and_those_of_type_checkers_are_not(tmp_path: Path) -> None:
    library, nodes = tmp_path / "fewstep", tmp_path / "nodes"
    for folder in (library, library / "a", nodes):
        folder.mkdir()
        (folder / "__init__.py").touch()
    (library / "b.py").write_text("from fewstep.a import c\n")
    (library / "a" / "c.py").touch()
    (library / "d.py").touch()
    code = "if TYPE_CHECKING:\n    import fewstep.d\ndef f():\n    import fewstep.b\n"
    (nodes / "one.py").write_text(code)
    assert set(needed_modules(Source(library, nodes))) == {
        *("fewstep", "fewstep.a", "fewstep.a.c", "fewstep.b"),
        *("fewstep.comfy_nodes", "fewstep.comfy_nodes.one"),
    }


def test_what_a_scan_finds_is_explained(pack: Path) -> None:
    found = findings(pack)
    assert found - set(EXPLAINED) == set()
    assert set(EXPLAINED) - found == set()  # an explanation that nothing needs hides the next


def test_the_linter_of_comfy_cli_passes(pack: Path) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache"]
    done = subprocess.run(
        [*command, "--select", "S102,S307,E702", str(pack)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if "No module named ruff" in done.stderr:
        pytest.skip("ruff is not installed")
    assert done.returncode == 0, done.stdout


def test_the_scan_sees_what_it_should() -> None:
    code = """
def f():
    import urllib.request
    from subprocess import run
    exec("1")
    re.compile("a")
    os.environ["A"] = os.getenv("B")
"""
    found = {"imports urllib", "imports subprocess", "calls exec", "uses os.environ"}
    assert set(in_code(code)) == {*found, "uses os.getenv"}


def test_nothing_in_the_pack_is_hidden_or_made_by_python(pack: Path) -> None:
    names = [file.relative_to(pack).as_posix() for file in pack.rglob("*") if file.is_file()]
    hidden = [name for name in names if Path(name).name.startswith(".")]
    assert hidden == [".comfyignore"]
    assert {name for name in names if name.endswith(".pyc")} == set()
    ignored = (pack / ".comfyignore").read_text(encoding="utf-8")
    assert {".comfyignore", MARKER, "__pycache__/"} <= set(ignored.split())
    assert sum((pack / name).stat().st_size for name in names) < 8 * 2**20


class TestCard:
    """pyproject.toml of the pack."""

    card = tomllib.loads((ROOT / "comfy_nodes/pyproject.toml").read_text(encoding="utf-8"))
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def test_it_is_of_this_release(self) -> None:
        assert self.card["project"]["version"] == __version__
        assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)

    def test_its_name_is_one_the_registry_takes(self) -> None:
        name = self.card["project"]["name"]
        assert name == NAME
        assert "comfyui" not in name.lower()

    def test_it_needs_nothing_but_python_and_comfyui(self) -> None:
        assert self.card["project"]["dependencies"] == []
        assert not (ROOT / "comfy_nodes/requirements.txt").exists()
        wanted = self.card["project"]["requires-python"]
        assert wanted == self.ours["project"]["requires-python"]
        assert wanted == f">={'.'.join(map(str, LEAST_PYTHON))}"
        least = ".".join(map(str, LEAST_COMFYUI))
        assert self.card["tool"]["comfy"]["requires-comfyui"] == f">={least}"

    def test_the_nodes_ask_for_the_same_python(self) -> None:
        body = ast.parse((ROOT / "comfy_nodes/__init__.py").read_text(encoding="utf-8"))
        compared = [ast.unparse(node) for node in ast.walk(body) if isinstance(node, ast.Compare)]
        assert f"sys.version_info < {LEAST_PYTHON}" in compared

    def test_licence_and_icon(self) -> None:
        licence = (ROOT / "comfy_nodes/LICENSE").read_bytes()
        assert licence == (ROOT / "LICENSE").read_bytes()
        icon = ROOT / "comfy_nodes/icon.png"
        assert icon.stat().st_size < 40_000
        with Image.open(icon) as picture:
            assert (picture.format, *picture.size) == ("PNG", 400, 400)


def test_the_start_imports_nothing_of_comfyui() -> None:
    body = ast.parse((ROOT / "comfy_nodes/__init__.py").read_text(encoding="utf-8")).body
    tops = {name.partition(".")[0] for name in imported(body, inside_functions=False)}
    assert tops <= sys.stdlib_module_names
