"""The pack: the node folder's own files, and under carried/ the part of fewstep they need."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from fewstep.comfy_install.source import Source, carried_files
from fewstep.errors import ConfigError

OWN_FILES = (".comfyignore", "LICENSE", "README.md", "__init__.py", "icon.png", "pyproject.toml")
OWN_FOLDERS = ("example_workflows", "locales", "subgraphs", "web")
"""What ComfyUI looks up beside `__init__.py`; a folder may be absent."""
CARRIED = "carried"
"""Where the nodes' `__init__.py` looks for a fewstep of their own."""


def pack_files(source: Source) -> dict[str, Path]:
    """Every file of the pack: its name in the pack, with "/", -> the file it is a copy of.

    Raises:
        ConfigError: The fewstep that runs lacks a part of the pack.
    """
    own = [source.nodes / name for name in OWN_FILES]
    missing = [file.name for file in own if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{source.nodes} lacks {', '.join(missing)}; install fewstep again with pip"
        )
    for folder in OWN_FOLDERS:
        own += [file for file in (source.nodes / folder).rglob("*") if _is_shipped(file)]
    files = {file.relative_to(source.nodes).as_posix(): file for file in own}
    files |= {f"{CARRIED}/{name}": file for name, file in carried_files(source).items()}
    return dict(sorted(files.items()))


def write_pack(files: Mapping[str, Path], folder: Path) -> None:
    """Copy the files, byte by byte, into a folder that is new or empty."""
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def write_new_pack(files: Mapping[str, Path], folder: Path) -> None:
    """The same, for a folder the user named.

    Raises:
        ConfigError: It is a file, or holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; give --out a new or an empty folder")
    write_pack(files, folder)


def _is_shipped(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and "__pycache__" not in file.parts
