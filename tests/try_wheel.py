"""`make wheel`: installs the newest wheel of a folder in a clean environment and imports all of it.

python tests/try_wheel.py dist torch==2.13.0
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

CHECK = """
import importlib, pkgutil, sysconfig
from pathlib import Path
import fewstep

HOSTS = ("comfy", "comfy_api", "folder_paths", "latent_preview", "nodes", "node_helpers")
site = Path(sysconfig.get_path("purelib"))
assert Path(fewstep.__file__).is_relative_to(site), fewstep.__file__
for leak in ("trainer", "export", "comfy_nodes", "tests"):
    assert not (site / leak).exists(), f"top-level {leak} in site-packages"
assert (site / "fewstep" / "py.typed").exists()
weights = list((site / "fewstep" / "digits").rglob("*.safetensors"))
assert weights, "the shipped weights are missing from the wheel"
names = [module.name for module in pkgutil.walk_packages(fewstep.__path__, "fewstep.")]
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # nodes are nothing without ComfyUI
        is_node = name.startswith("fewstep.comfy_nodes.")
        assert is_node and error.name.split(".")[0] in HOSTS, f"{name}: {error}"
print(f"{len(names)} modules import; {len(weights)} weight files")
"""


def main(folder: Path, torch: list[str]) -> None:
    """Install the newest wheel and check it.

    Args:
        folder: Where `python -m build` wrote.
        torch: What to give pip first: the torch build, and flags.
    """
    wheel = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime).resolve()
    with tempfile.TemporaryDirectory() as home:
        venv.create(home, with_pip=True)
        scripts = Path(home) / ("Scripts" if sys.platform == "win32" else "bin")
        python = scripts / "python"
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *torch], check=True, cwd=home)
        subprocess.run([*install, f"{wheel}[train,export,runtime,openvino]"], check=True, cwd=home)
        subprocess.run([python, "-c", CHECK], check=True, cwd=home)
        subprocess.run(
            [scripts / "fewstep", "--help"], check=True, cwd=home, stdout=subprocess.DEVNULL
        )
        subprocess.run(
            [python, "-m", "fewstep.trainer", "--help"],
            check=True,
            cwd=home,
            stdout=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
