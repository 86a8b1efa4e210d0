"""`fewstep comfy install`: whole or not at all, only what is ours, current or not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep import __version__
from fewstep.cli.comfy import NOT_READY
from fewstep.cli.main import main
from fewstep.comfy_install import check, find_comfyui, find_source, install, uninstall
from fewstep.comfy_install import installing as installing_module
from fewstep.comfy_install.assembly import OWN_FILES
from fewstep.comfy_install.installed import MARKER, NAME, find_installed
from fewstep.comfy_install.source import Source
from fewstep.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("fewstep", "trainer", "export", "comfy_nodes")
FROM_SITE = """
import sys
sys.path.insert(0, sys.argv[1])
import fewstep
assert fewstep.__file__.startswith(sys.argv[1]), fewstep.__file__
from fewstep.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A checkout in small, which `fewstep comfy` installs from."""
    library, nodes = tmp_path / "small" / "fewstep", tmp_path / "small" / "comfy_nodes"
    files = {
        library / "__init__.py": "",
        library / "recipe.py": "STEPS = 4\n",
        library / "zoo" / "__init__.py": "",
        library / "zoo" / "entries" / "one.json": "{}",
        nodes / "extension.py": "from fewstep.comfy_nodes.sockets import STEPS\n",
        nodes / "sockets.py": "from fewstep.recipe import STEPS\nimport fewstep.zoo\n",
        nodes / "locales" / "en" / "main.json": "{}",
    }
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in OWN_FILES:
        shutil.copy(ROOT / "comfy_nodes" / name, nodes)
    source = Source(library, nodes.resolve())
    monkeypatch.setattr("fewstep.comfy_install.find_source", lambda: source)
    return source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What of a ComfyUI this looks at."""
    folder = tmp_path / "ComfyUI"
    (folder / "custom_nodes" / "another-pack").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('# made by a program\n__version__ = "0.8.0"\n')
    venv = folder / "venv"
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.4\n")
    return folder


@pytest.fixture
def pack(folder: Path) -> Path:
    """Where the pack goes."""
    return folder / "custom_nodes" / NAME


def run(folder: Path, *options: str) -> int:
    return main(["comfy", "install", "--comfyui", str(folder), *options])


def left_over(folder: Path) -> list[str]:
    names = {path.name for path in (folder / "custom_nodes").iterdir()}
    return sorted(names - {"another-pack", NAME})


def needs_links(folder: Path) -> None:
    try:
        (folder / "try").symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("links cannot be made here")
    (folder / "try").unlink()


def test_it_is_copied_and_current(folder: Path, pack: Path) -> None:
    assert run(folder, "--check") == NOT_READY
    assert run(folder) == 0
    assert (pack / "__init__.py").is_file()
    assert (pack / "carried/fewstep/comfy_nodes/sockets.py").is_file()
    assert (pack / "carried/fewstep/zoo/entries/one.json").is_file()
    assert (pack / "locales/en/main.json").is_file()
    assert not pack.is_symlink()
    assert left_over(folder) == []
    assert run(folder, "--check") == 0
    assert run(folder, "--copy") == 0  # once more, over the first


def test_the_report_is_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--quiet")
    assert capsys.readouterr().out == ""
    assert run(folder, "--check", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["installed"] == "copy"
    assert said["installed_version"] == __version__
    assert said["current"]
    assert said["ready"]
    assert [one["found"] for one in said["requirements"]] == ["0.8.0", "3.12.4"]


def test_a_changed_or_missing_file_is_told_and_mended(
    folder: Path, pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder)
    (pack / "README.md").write_text("mine")
    (pack / "carried/fewstep/recipe.py").unlink()
    assert run(folder, "--check") == NOT_READY
    said = capsys.readouterr().out
    assert "2 files differ from this one's (README.md, carried/fewstep/recipe.py)" in said
    assert run(folder) == 0
    assert run(folder, "--check") == 0


def test_files_of_an_older_release_go(folder: Path, pack: Path, source: Source) -> None:
    run(folder)
    (pack / "nodes_of_old.py").touch()
    marker = json.loads((pack / MARKER).read_text())
    older = {**marker, "fewstep": "0.0.1", "files": [*marker["files"], "nodes_of_old.py"]}
    (pack / MARKER).write_text(json.dumps(older))
    report = check(find_comfyui(folder), source)
    assert report.differing == ("nodes_of_old.py",)
    assert report.installed.version == "0.0.1"
    assert run(folder) == 0
    assert not (pack / "nodes_of_old.py").exists()


def test_uninstall_removes_all_that_is_ours_and_what_python_cached(
    folder: Path, pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder)
    (pack / "__pycache__").mkdir()
    (pack / "__pycache__" / "__init__.cpython-312.pyc").touch()
    assert run(folder, "--uninstall") == 0
    assert not pack.exists()
    assert left_over(folder) == []
    capsys.readouterr()
    assert run(folder, "--uninstall") == 0
    assert "there is nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--link",), ("--uninstall",)])
def test_a_folder_of_somebody_else_is_left_alone(
    folder: Path, pack: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    pack.mkdir()
    (pack / "precious.py").write_text("mine")
    assert run(folder, *options) == 2
    assert 'was not made by "fewstep comfy install"; remove it the way' in capsys.readouterr().err
    assert (pack / "precious.py").read_text() == "mine"
    assert run(folder, "--check") == NOT_READY


@pytest.mark.parametrize("options", [(), ("--link",), ("--uninstall",)])
def test_somebodys_files_in_our_folder_are_not_lost(
    folder: Path, pack: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder)
    (pack / "example_workflows").mkdir(exist_ok=True)
    (pack / "example_workflows" / "my own.json").write_text("{}")
    assert run(folder, *options) == 2
    said = capsys.readouterr().err
    assert "files that are not of the pack (example_workflows/my own.json); move them" in said
    assert (pack / "example_workflows" / "my own.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "other"}', '{"files": 1}'])
def test_a_damaged_marker_makes_nothing_ours(folder: Path, pack: Path, text: str) -> None:
    run(folder)
    (pack / MARKER).write_text(text)
    assert find_installed(folder / "custom_nodes").kind == "foreign"
    assert run(folder, "--uninstall") == 2
    assert (pack / "__init__.py").exists()


def test_a_copy_that_fails_leaves_the_old_one(
    folder: Path, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder)
    before = sorted(pack.rglob("*"))

    def full(files: dict[str, Path], target: Path) -> None:
        target.mkdir()
        (target / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installing_module, "write_pack", full)
    assert run(folder) == 2
    assert sorted(pack.rglob("*")) == before
    assert left_over(folder) == []


@pytest.mark.parametrize("at", ["old", NAME])
def test_a_rename_that_fails_leaves_the_old_one(
    folder: Path, pack: Path, at: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run(folder)
    rename = Path.rename
    refused: list[str] = []

    def busy(self: Path, target: Path) -> Path:
        if target.name == at and not refused:
            refused.append(at)
            raise PermissionError(13, "Access is denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    assert run(folder) == 2
    assert "cannot be written (Access is denied); close ComfyUI if it" in capsys.readouterr().err
    assert run(folder, "--check") == 0
    assert left_over(folder) == []


def test_a_temporary_folder_is_one_that_comfyui_skips(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    write = installing_module.write_pack

    def look(files: dict[str, Path], target: Path) -> None:
        seen.extend(left_over(folder))
        write(files, target)

    monkeypatch.setattr(installing_module, "write_pack", look)
    run(folder)
    assert len(seen) == 1
    assert seen[0].endswith(".disabled")


class TestLink:
    """--link."""

    @pytest.fixture(autouse=True)
    def _links(self, tmp_path: Path) -> None:
        needs_links(tmp_path)

    def test_it_points_at_the_node_folder(self, folder: Path, pack: Path, source: Source) -> None:
        assert run(folder, "--link") == 0
        assert pack.resolve() == source.nodes
        assert run(folder, "--check") == 0
        assert run(folder) == 0  # a copy takes its place
        assert not pack.is_symlink()
        assert run(folder, "--link") == 0
        assert run(folder, "--uninstall") == 0
        assert not os.path.lexists(pack)
        assert (source.nodes / "__init__.py").exists()

    def test_one_to_another_checkout_is_ours_but_not_current(
        self, folder: Path, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        other = tmp_path / "comfy_nodes"
        other.mkdir()
        shutil.copy(ROOT / "comfy_nodes/pyproject.toml", other)
        pack.symlink_to(other, target_is_directory=True)
        assert run(folder, "--check") == NOT_READY
        assert "another checkout than this" in capsys.readouterr().out
        shutil.rmtree(other)  # a checkout that is gone
        assert find_installed(folder / "custom_nodes").kind == "link"
        assert run(folder, "--uninstall") == 0
        assert not os.path.lexists(pack)

    def test_one_to_something_else_is_left_alone(
        self, folder: Path, pack: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        other.mkdir()
        pack.symlink_to(other, target_is_directory=True)
        assert run(folder) == 2
        assert run(folder, "--uninstall") == 2
        assert pack.is_symlink()


def test_where_links_are_refused_a_copy_is_advised(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder)

    def refuse(self: Path, target: Path, target_is_directory: bool = False) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert run(folder, "--link") == 2
    said = capsys.readouterr().err
    assert "links cannot be made here (A required privilege is not held by the client)" in said
    assert "use --copy, or turn on Developer Mode on Windows" in said
    assert run(folder, "--check") == 0  # the copy is still there
    assert left_over(folder) == []


def test_only_one_action_at_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--copy", "--link") == 2
    assert "--copy" in capsys.readouterr().err


class TestPlaces:
    """Which folder is a ComfyUI, and what runs it."""

    def test_the_portable_folder_above(self, folder: Path, tmp_path: Path) -> None:
        shutil.rmtree(folder / "venv")
        (tmp_path / "python_embeded").mkdir()
        (tmp_path / "python_embeded" / "python313._pth").touch()
        found = find_comfyui(tmp_path)
        assert (found.folder, found.kind, found.python) == (folder, "program", "3.13")

    def test_the_data_folder_of_the_desktop_app(self, tmp_path: Path, source: Source) -> None:
        for name in ("custom_nodes", "models", "user", ".venv"):
            (tmp_path / name).mkdir()
        cfg = "version = 20.31.2\nversion_info = 3.12.9.final.0\n"  # the first is virtualenv's own
        (tmp_path / ".venv" / "pyvenv.cfg").write_text(cfg)
        found = find_comfyui(tmp_path)
        assert (found.folder, found.kind) == (tmp_path, "data")
        assert (found.version, found.python) == (None, "3.12.9")
        install(found, source)
        assert check(found, source).is_ready  # its version is not told by this folder

    @pytest.mark.parametrize("name", ["", "custom_nodes", "models"])
    def test_another_folder(self, folder: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=r"is not a ComfyUI: it has no main.py and custom"):
            find_comfyui(folder / name if name else folder.parent / "elsewhere")

    def test_one_that_is_too_old(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run(folder)
        (folder / "comfyui_version.py").write_text('__version__ = "0.7.12"\n')
        (folder / "venv" / "pyvenv.cfg").write_text("version = 3.10.2\n")
        capsys.readouterr()
        assert run(folder, "--check") == NOT_READY
        said = capsys.readouterr().out
        assert "0.7.12, which is too old" in said
        assert "3.10.2, which is too old" in said

    def test_one_without_a_version_is_older_than_the_first_that_had_one(
        self, folder: Path, source: Source
    ) -> None:
        (folder / "comfyui_version.py").unlink()
        requirement = check(find_comfyui(folder), source).requirements[0]
        assert (requirement.found, requirement.is_met) == ("0.0.0", False)


def test_uninstall_says_what_it_removed(folder: Path, source: Source) -> None:
    comfyui = find_comfyui(folder)
    install(comfyui, source)
    assert uninstall(comfyui).kind == "copy"
    assert uninstall(comfyui).kind == "nothing"


def test_a_fewstep_without_the_parts_of_the_pack_says_so(
    folder: Path, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    (source.nodes / "icon.png").unlink()
    assert run(folder) == 2
    assert "lacks icon.png; install fewstep again with pip" in capsys.readouterr().err


def test_a_real_checkout_is_found() -> None:
    assert find_source() == Source(ROOT / "fewstep", ROOT / "comfy_nodes")
    assert find_source().is_checkout


def test_one_installed_by_pip_is_not_linked(
    folder: Path, source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    (source.nodes.parent / "fewstep").rename(source.nodes.parent / "elsewhere")
    assert run(folder, "--link") == 2
    assert "--link is for a checkout of fewstep" in capsys.readouterr().err


class TestPack:
    """`fewstep comfy pack`."""

    def test_it_is_what_install_puts_there(self, folder: Path, pack: Path, tmp_path: Path) -> None:
        out = tmp_path / "some" / "where"
        assert main(["comfy", "pack", "--out", str(out)]) == 0
        run(folder)
        names = {file.relative_to(out) for file in out.rglob("*") if file.is_file()}
        installed = {file.relative_to(pack) for file in pack.rglob("*") if file.is_file()}
        assert installed - names == {Path(MARKER)}
        assert names <= installed

    def test_a_folder_in_use_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "mine").touch()
        assert main(["comfy", "pack", "--out", str(tmp_path)]) == 2
        assert "give --out a new or an empty folder" in capsys.readouterr().err


@pytest.mark.slow
def test_it_works_from_a_wheel(folder: Path, pack: Path, tmp_path: Path) -> None:
    """Builds one of this tree, and installs it apart."""
    tree, dist, site = tmp_path / "tree", tmp_path / "dist", tmp_path / "site"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in BUILT:  # links in fewstep/ are left out: a checkout without links has none
        ignored = shutil.ignore_patterns("__pycache__", *(BUILT[1:] if name == "fewstep" else ()))
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(dist), str(tree)]
    subprocess.run(build, check=True)
    (wheel,) = dist.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), wheel], check=True)

    def fewstep(*argv: str) -> int:
        command = [sys.executable, "-c", FROM_SITE, str(site), "comfy", "install", *argv]
        return subprocess.run(command, check=False, cwd=tmp_path).returncode

    assert fewstep("--comfyui", str(folder), "--link") == 2
    assert fewstep("--comfyui", str(folder)) == 0
    assert fewstep("--comfyui", str(folder), "--check") == 0
    assert check(find_comfyui(folder), find_source()).is_current  # the checkout's, byte by byte
    assert fewstep("--comfyui", str(folder), "--uninstall") == 0
    assert not pack.exists()
