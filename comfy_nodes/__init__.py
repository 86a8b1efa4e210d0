"""The Few-Step nodes: the folder ComfyUI loads, and the package `fewstep.comfy_nodes`.

ComfyUI loads this folder under a name of its own making. All it asks of this file is below; the
nodes themselves are imported as `fewstep.comfy_nodes...`, from the copy of fewstep an installed
folder carries, from the checkout this folder is linked to, or from an installed fewstep. Importing
this file needs neither ComfyUI nor torch.
"""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./web"
"""Help pages of the nodes: web/docs/<node>.md."""

CARRIED = "carried"
"""Folder in an installed pack that holds its own fewstep; made by `fewstep comfy install`."""


async def comfy_entrypoint() -> Any:
    """What ComfyUI asks for: the extension with all nodes."""
    if sys.version_info < (3, 11):  # noqa: UP036  ComfyUI itself still starts on 3.10
        found = sys.version.split()[0]
        raise RuntimeError(
            f"the Few-Step nodes need Python 3.11 or newer, this ComfyUI runs on {found}"
        )
    find_fewstep(Path(os.path.realpath(__file__)).parent)
    from fewstep.comfy_nodes.extension import FewStepExtension

    return FewStepExtension()


def find_fewstep(folder: Path) -> None:
    """Make `import fewstep` find the release these nodes were written for.

    Args:
        folder: This folder, links resolved.
    """
    if "fewstep" in sys.modules:
        return
    carried = folder / CARRIED
    if (carried / "fewstep").is_dir():
        if _installed_version() != _version_of(carried):
            sys.path.insert(0, str(carried))
    elif (folder.parent / "fewstep" / "recipe.py").is_file():
        sys.path.insert(0, str(folder.parent))


def _installed_version() -> str | None:
    if importlib.util.find_spec("fewstep") is None:  # a card without a package is none
        return None
    try:
        return importlib.metadata.version("fewstep")
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_of(carried: Path) -> str:
    for line in (carried / "fewstep" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__ = "):
            return line.split('"')[1]
    return "unknown"
