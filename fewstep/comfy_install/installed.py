"""What lies at custom_nodes/fewstep-nodes, and whether it is ours to replace or remove."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep import __version__
from fewstep.errors import ConfigError

NAME = "fewstep-nodes"
"""Not "fewstep": some packs put custom_nodes on sys.path, and that name would hide the library."""
MARKER = ".fewstep-nodes.json"
"""In a copy: who made it, and what of it is ours."""
FORMAT = "fewstep.comfy_install/1"
OTHER_WAYS = "remove it the way it was installed (ComfyUI-Manager, git or by hand), then try again"


@dataclass(frozen=True, slots=True)
class Installed:
    """What is at the place of the pack.

    Attributes:
        path: The place.
        kind: "nothing", a "copy" or a "link" of ours, or something "foreign".
        version: Of the fewstep that made the copy.
        files: What we put into the copy, by name with "/".
        target: Where the link points.
    """

    path: Path
    kind: Literal["nothing", "copy", "link", "foreign"]
    version: str | None = None
    files: tuple[str, ...] = ()
    target: Path | None = None

    def others(self) -> list[str]:
        """Files in the copy that somebody else put there; what Python caches is not counted."""
        ours = {MARKER, *self.files}
        found = (file for file in sorted(self.path.rglob("*")) if not _is_plain_folder(file))
        names = (file.relative_to(self.path) for file in found)
        return [
            name.as_posix()
            for name in names
            if name.as_posix() not in ours and "__pycache__" not in name.parts
        ]


def find_installed(custom_nodes: Path) -> Installed:
    """Look, and change nothing."""
    path = custom_nodes / NAME
    if path.is_symlink():
        target = Path(os.path.realpath(path))
        return Installed(path, "link" if _is_node_folder(target) else "foreign", target=target)
    if not path.exists():
        return Installed(path, "nothing")
    marker = _read_marker(path / MARKER)
    if marker is None:
        return Installed(path, "foreign")
    return Installed(path, "copy", marker["fewstep"], tuple(marker["files"]))


def require_ours(found: Installed) -> None:
    """Pass where there is nothing, or what is there is ours and nothing else is in it.

    Raises:
        ConfigError: Something would be lost that is not ours.
    """
    if found.kind == "foreign":
        raise ConfigError(f'{found.path} was not made by "fewstep comfy install"; {OTHER_WAYS}')
    others = found.others() if found.kind == "copy" else []
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ConfigError(
            f"{found.path} holds files that are not of the pack ({shown}); move them elsewhere, "
            "then try again"
        )


def write_marker(folder: Path, files: Sequence[str]) -> None:
    """Say in a copy that it is ours."""
    data = {"format": FORMAT, "fewstep": __version__, "files": list(files)}
    (folder / MARKER).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _read_marker(file: Path) -> dict[str, Any] | None:
    """The marker, or None where there is none that we wrote."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return None
    files = data.get("files")
    is_whole = isinstance(files, list) and all(isinstance(name, str) for name in files)
    return data if is_whole and isinstance(data.get("fewstep"), str) else None


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_node_folder(target: Path) -> bool:
    """Whether a link's target is the node folder of a checkout, or was one that is gone."""
    if not target.exists():
        return target.name == "comfy_nodes"
    project = target / "pyproject.toml"
    return project.is_file() and f'name = "{NAME}"' in project.read_text(encoding="utf-8")
