"""Weight shapes of a base model from its files' headers: no torch, no weights read."""

import json
from pathlib import Path

from fewstep.adapters.header import read_header
from fewstep.adapters.names import shown
from fewstep.errors import AdapterError

DENOISERS = ("transformer", "unet")
INDEX_SUFFIX = ".safetensors.index.json"


def base_shapes_of_folder(folder: Path, component: str) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of one component of a diffusers folder.

    Reads `folder/component`: a sharded model's index, else the plain single file, else the single
    file of a variant such as fp16 (shapes are the same).

    Raises:
        AdapterError: There are no safetensors weights, or a file or the index is damaged.
    """
    return _shapes_in(Path(folder) / component)


def denoiser_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The same for a pipeline's denoiser, or for a folder that holds just a denoiser."""
    folder = Path(folder)
    for component in DENOISERS:
        if (folder / component).is_dir():
            return base_shapes_of_folder(folder, component)
    return _shapes_in(folder)


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder; give a diffusers model folder")
    # The shortest name is the one without a variant.
    indexes = sorted(folder.glob(f"*{INDEX_SUFFIX}"), key=lambda p: (len(p.name), p.name))
    if indexes:
        return _shapes_of_index(indexes[0])
    singles = sorted(folder.glob("*.safetensors"), key=lambda p: (len(p.name), p.name))
    if not singles:
        raise AdapterError(
            f"{folder}: no .safetensors weights here; save the model with safe_serialization=True"
        )
    return _shapes_of_file(singles[0])


def _shapes_of_file(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_header(path).tensors.items()}


def _shapes_of_index(index: Path) -> dict[str, tuple[int, ...]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        files = {name: str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{index}: not a safetensors index; download it again") from error
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise AdapterError(f"{index}: names the shard {shown(file)} outside its own folder")
        shards[file] = _shapes_of_file(index.parent / file)
    for name, file in files.items():
        if name not in shards[file]:
            raise AdapterError(
                f"{index}: says {shown(name)} is in {shown(file)}, but it is not; download both"
            )
    return {name: shards[file][name] for name, file in files.items()}
