"""Where a ComfyUI lies, what version it is and which Python it runs on; read from files alone."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.errors import ConfigError

NODES_FOLDER = "custom_nodes"
DATA_FOLDERS = ("models", "user")
"""What lies beside custom_nodes/ in the folder that the desktop app, or --base-directory, uses."""
VENVS = (".venv", "venv")
EMBEDDED = "python_embeded"  # the portable build's own spelling
_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_VENV_VERSIONS = tuple(  # in virtualenv's file "version" is its own, and "version_info" Python's
    re.compile(rf"^{key}\s*=\s*(\d+\.\d+(?:\.\d+)?)", re.MULTILINE)
    for key in ("version_info", "version")
)
_LIBRARY = re.compile(r"python(\d)(\d+)\._pth")


@dataclass(frozen=True, slots=True)
class ComfyUI:
    """A ComfyUI on this machine.

    Attributes:
        folder: The folder that holds custom_nodes/.
        kind: "program" with main.py beside custom_nodes/; "data" where the program is elsewhere,
            as for the desktop app.
        version: Such as "0.8.0"; None where nothing says.
        python: Version of the Python found in or beside the folder; None where there is none.
    """

    folder: Path
    kind: Literal["program", "data"]
    version: str | None
    python: str | None

    @property
    def custom_nodes(self) -> Path:
        """Where node packs lie."""
        return self.folder / NODES_FOLDER


def find_comfyui(path: Path) -> ComfyUI:
    """The ComfyUI that a path means.

    Args:
        path: The folder with main.py and custom_nodes/, one that holds such a folder named ComfyUI
            (the Windows portable build), or the data folder of the desktop app.

    Raises:
        ConfigError: It is none of these.
    """
    path = path.expanduser().absolute()
    for folder in (path, path / "ComfyUI"):
        if (folder / "main.py").is_file() and (folder / NODES_FOLDER).is_dir():
            return ComfyUI(folder, "program", _version(folder), _python(folder))
    if all((path / name).is_dir() for name in (NODES_FOLDER, *DATA_FOLDERS)):
        return ComfyUI(path, "data", None, _python(path))
    raise ConfigError(
        f"{path} is not a ComfyUI: it has no main.py and {NODES_FOLDER}/; give the folder that has "
        "them, the portable folder above it, or the data folder of the desktop app"
    )


def _version(folder: Path) -> str | None:
    file = folder / "comfyui_version.py"
    found = _VERSION.search(_text(file)) if file.is_file() else None
    return found and found.group(1)


def _python(folder: Path) -> str | None:
    for home in (folder, folder.parent):
        for file in sorted((home / EMBEDDED).glob("python*._pth")):
            if found := _LIBRARY.fullmatch(file.name):
                return ".".join(found.groups())
        for name in VENVS:
            if found := _python_of_venv(home / name / "pyvenv.cfg"):
                return found
    return None


def _python_of_venv(file: Path) -> str | None:
    text = _text(file) if file.is_file() else ""
    found = (pattern.search(text) for pattern in _VENV_VERSIONS)
    return next((match.group(1) for match in found if match), None)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
