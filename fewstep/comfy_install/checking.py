"""Is the pack in a ComfyUI, is it this fewstep's, and can it run there?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.comfy_install.assembly import pack_files
from fewstep.comfy_install.installed import Installed, find_installed
from fewstep.comfy_install.places import ComfyUI
from fewstep.comfy_install.source import Source

LEAST_COMFYUI = (0, 8, 0)
LEAST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Requirement:
    """What the nodes need of a ComfyUI.

    Attributes:
        name: What it is about.
        wanted: The oldest version that will do.
        found: The version there; None where nothing in the folder says.
        is_met: None where `found` is.
    """

    name: str
    wanted: str
    found: str | None
    is_met: bool | None


@dataclass(frozen=True, slots=True)
class Report:
    """The state of one ComfyUI.

    Attributes:
        comfyui: It.
        installed: What is at the pack's place.
        differing: Files that are missing or hold other bytes than this fewstep's, by name.
        others: Files in the copy that we did not put there.
        requirements: What the nodes need.
    """

    comfyui: ComfyUI
    installed: Installed
    differing: tuple[str, ...]
    others: tuple[str, ...]
    requirements: tuple[Requirement, ...]

    @property
    def is_current(self) -> bool:
        """Whether what is there is this fewstep's pack, byte by byte."""
        return self.installed.kind in ("copy", "link") and not self.differing

    @property
    def is_ready(self) -> bool:
        """Whether it is current and nothing it needs is known to be missing."""
        return self.is_current and all(one.is_met is not False for one in self.requirements)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        target = self.installed.target
        return {
            "comfyui": str(self.comfyui.folder),
            "kind": self.comfyui.kind,
            "pack": str(self.installed.path),
            "installed": self.installed.kind,
            "installed_version": self.installed.version,
            "link_target": None if target is None else str(target),
            "fewstep": __version__,
            "current": self.is_current,
            "differing": list(self.differing),
            "others": list(self.others),
            "requirements": [
                {"name": one.name, "wanted": one.wanted, "found": one.found, "met": one.is_met}
                for one in self.requirements
            ],
            "ready": self.is_ready,
        }


def check(comfyui: ComfyUI, source: Source) -> Report:
    """Compare what is installed with what this fewstep would install; changes nothing.

    Raises:
        ConfigError: The fewstep that runs lacks a part of the pack.
    """
    installed = find_installed(comfyui.custom_nodes)
    differing: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    if installed.kind == "copy":
        differing = tuple(_differing(installed, pack_files(source)))
        others = tuple(installed.others())
    elif installed.kind == "link" and installed.target != source.nodes:
        differing = (str(installed.target),)
    return Report(comfyui, installed, differing, others, _requirements(comfyui))


def _differing(installed: Installed, files: Mapping[str, Path]) -> list[str]:
    """Names whose bytes are not ours, and names of an older release that are there no more."""
    left_over = [
        name for name in installed.files if name not in files and (installed.path / name).exists()
    ]
    return left_over + [
        name for name, file in files.items() if not _is_copy(installed.path / name, file)
    ]


def _is_copy(copy: Path, file: Path) -> bool:
    return copy.is_file() and copy.read_bytes() == file.read_bytes()


def _requirements(comfyui: ComfyUI) -> tuple[Requirement, ...]:
    # main.py without a version beside it: older than the first release that had one.
    version = comfyui.version or ("0.0.0" if comfyui.kind == "program" else None)
    return (
        _requirement("ComfyUI", LEAST_COMFYUI, version),
        _requirement("Python", LEAST_PYTHON, comfyui.python),
    )


def _requirement(name: str, least: tuple[int, ...], found: str | None) -> Requirement:
    numbers = None if found is None else _numbers(found)
    is_met = None if numbers is None else numbers >= least
    return Requirement(name, ".".join(map(str, least)), found, is_met)


def _numbers(version: str) -> tuple[int, ...]:
    """ "0.8.0rc1" -> (0, 8, 0)."""
    parts = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
