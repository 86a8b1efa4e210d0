"""An environment that has what ComfyUI needs, and no fewstep: as users have it."""

import subprocess
import sysconfig
import venv
from pathlib import Path

OF_FEWSTEP = ("fewstep", "__editable__")
"""Beginnings of the names that an installed fewstep has among the packages."""


def plain_python(folder: Path) -> Path:
    """Make an environment with this one's packages, without fewstep.

    Packages are linked one by one. Links to `.pth` files are left out too: they would bring an
    editable fewstep back.

    Args:
        folder: Of the new environment; must not exist.

    Returns:
        Its Python.

    Raises:
        RuntimeError: `import fewstep` works there.
    """
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(OF_FEWSTEP) and package.suffix != ".pth":
            (packages / package.name).symlink_to(package)
    python = folder / "bin" / "python"
    if _can_import(python, "fewstep", folder):
        raise RuntimeError(f"fewstep can be imported in {folder}, which is to be without it")
    return python


def _can_import(python: Path, name: str, folder: Path) -> bool:
    command = (python, "-I", "-c", f"import {name}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0 and f"No module named '{name}'" not in done.stderr:
        raise RuntimeError(f"{python} does not run:\n{done.stderr}")
    return done.returncode == 0
