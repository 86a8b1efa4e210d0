"""Put the pack into a ComfyUI or take it out: whole or not at all, and only what is ours.

A new pack is made in a temporary folder beside the old one and takes its place by renaming. The
temporary folder's name ends in ".disabled", which ComfyUI skips should it start in between.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from fewstep.comfy_install.assembly import pack_files, write_pack
from fewstep.comfy_install.installed import (
    NAME,
    Installed,
    find_installed,
    require_ours,
    write_marker,
)
from fewstep.comfy_install.places import ComfyUI
from fewstep.comfy_install.source import Source
from fewstep.errors import ConfigError


def install(comfyui: ComfyUI, source: Source) -> Installed:
    """Copy the pack, in place of an older copy or link of ours.

    Raises:
        ConfigError: Something that is not ours is in the way.
        OSError: The folder cannot be written; what was there is there still.
    """
    files = pack_files(source)

    def build(folder: Path) -> None:
        write_pack(files, folder)
        write_marker(folder, list(files))

    return _put(comfyui, build)


def link(comfyui: ComfyUI, source: Source) -> Installed:
    """Link the node folder of this checkout, so that changes to it are seen at the next start.

    Raises:
        ConfigError: This fewstep is no checkout, links cannot be made here, or something that is
            not ours is in the way.
    """
    if not source.is_checkout:
        raise ConfigError(
            "--link is for a checkout of fewstep, and this one was installed by pip; use --copy"
        )

    def build(folder: Path) -> None:
        try:
            folder.symlink_to(source.nodes, target_is_directory=True)
        except (OSError, NotImplementedError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise ConfigError(
                f"{comfyui.custom_nodes}: links cannot be made here ({reason or error}); use "
                "--copy, or turn on Developer Mode on Windows"
            ) from error

    return _put(comfyui, build)


def uninstall(comfyui: ComfyUI) -> Installed:
    """Remove our copy or link.

    Returns:
        What was removed; kind "nothing" where there was nothing.

    Raises:
        ConfigError: What is there is not ours, or holds files of somebody else.
    """
    found = find_installed(comfyui.custom_nodes)
    require_ours(found)
    if found.kind != "nothing":
        _replace(found.path, None)
    return found


def _put(comfyui: ComfyUI, build: Callable[[Path], None]) -> Installed:
    found = find_installed(comfyui.custom_nodes)
    require_ours(found)
    _replace(found.path, build)
    return find_installed(comfyui.custom_nodes)


def _replace(place: Path, build: Callable[[Path], None] | None) -> None:
    """Make what shall be at a place, then take away what is there and put the new one in."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", suffix=".disabled", dir=place.parent))
        _swap(place, work, build)
    except PermissionError as error:
        raise ConfigError(
            f"{place} cannot be written ({error.strerror}); close ComfyUI if it runs, and see that "
            "the folder is yours"
        ) from error


def _swap(place: Path, work: Path, build: Callable[[Path], None] | None) -> None:
    new, old = work / "new", work / "old"
    try:
        if build is not None:
            build(new)
        if os.path.lexists(place):
            place.rename(old)
        if build is not None:
            new.rename(place)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(place):
            old.rename(place)  # where this fails too, the old pack is still in `work`
        shutil.rmtree(work)
        raise
    shutil.rmtree(work, ignore_errors=True)  # done; a file held open elsewhere is no failure
