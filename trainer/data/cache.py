"""A folder of safetensors shards that were costly to make, each with its checksum.

    <root>/embeddings-<digest>/      one folder per encoder and its settings
        index.json                   what made the shards, and the sha256 of each
        <key>.safetensors            named after its content: prompts, or pictures of one size

A shard is listed after it was written whole under another name, synced and renamed, so a run killed
at any moment leaves whole shards and perhaps one `.partial` file, and the next run makes only what
is not listed. The processes of a run may all ask for the same shard: a file lock lets one make it
while the others wait.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer.data.digests import digest_of, file_digest

FORMAT = "fewstep.cache/1"
INDEX = "index.json"
LOCK = ".lock"
KEY = "fewstep.cache.key"

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


class ShardCache:
    """Shards of one kind, made by one encoder.

    Args:
        root: The user's cache folder; caches of other encoders lie beside this one in it.
        kind: First part of the folder's name.
        made_by: Everything but the shard's own content that its tensors depend on.

    Raises:
        ConfigError: The folder's index is damaged or belongs to something else.
    """

    def __init__(self, root: Path, kind: str, made_by: Mapping[str, object]) -> None:
        self._made_by = dict(made_by)
        self._digest = digest_of([kind, self._made_by])
        self.folder = root / f"{kind}-{self._digest[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._checksums = self._read_index()

    def shard(self, content: object, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a shard, read if it is there, else made and written.

        Args:
            content: What the shard holds embeddings or latents of, as plain data.
            make: Called for a shard that is not there.

        Returns:
            Memory-mapped tensors on the CPU.

        Raises:
            ConfigError: The shard is damaged or not the one it should be.
        """
        key = digest_of([self._digest, content])
        path = self.folder / f"{key[:24]}.safetensors"
        if not self._is_there(path):
            with FileLock(self.folder / LOCK):
                self._checksums = self._read_index()
                if not self._is_there(path):
                    self._write(path, key, make())
                    return _mapped(path, key)
        if file_digest(path) != self._checksums[path.name]:
            raise ConfigError(
                f"{path} is damaged (its sha256 is not the one in {INDEX}); delete this file and "
                "run again: it alone is made anew"
            )
        return _mapped(path, key)

    def _is_there(self, path: Path) -> bool:
        return path.name in self._checksums and path.is_file()

    def _write(self, path: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
        for leftover in self.folder.glob(".*.partial"):  # of a run that was killed
            leftover.unlink()
        partial = path.with_name(f".{path.name}.partial")
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(ready, partial, metadata={KEY: key})
        checksum = file_digest(partial)
        _publish(partial, path)
        self._checksums[path.name] = checksum
        index = {
            "format": FORMAT,
            "digest": self._digest,
            "made_by": self._made_by,
            "shards": dict(sorted(self._checksums.items())),
        }
        partial = self.folder / f".{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        _publish(partial, self.folder / INDEX)

    def _read_index(self) -> dict[str, str]:
        """File name -> sha256 of the shards that are whole."""
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        remedy = f"delete the folder {self.folder} and run again: it is made anew"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            found = (index["format"], index["digest"])
            shards = {str(name): str(checksum) for name, checksum in index["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); {remedy}") from error
        if found != (FORMAT, self._digest):
            raise ConfigError(f"{path} belongs to other weights, settings or releases; {remedy}")
        return shards


def _publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, so that it survives a power cut whole or not at all."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _mapped(path: Path, key: str) -> dict[str, Tensor]:
    remedy = "delete this file and run again: it alone is made anew"
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {remedy}") from error
    if found != key:
        raise ConfigError(f"{path} is of another cache (its key differs); {remedy}")
    return tensors
