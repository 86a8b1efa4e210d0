"""Where an adapter and its recipe lie: local files first, then the Hugging Face hub. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.adapters.header import PICKLE_SUFFIXES
from fewstep.errors import AdapterError
from fewstep.recipe import SIDECAR_NAME

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
"""`from_pretrained` arguments that also say how to reach the hub."""
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter on this machine.

    Attributes:
        path: The safetensors file, or a pickle.
        sidecar: The recipe file beside it, where there is one.
    """

    path: Path
    sidecar: Path | None


def find_adapter(adapter: str | Path, hub_options: Mapping[str, Any] | None = None) -> AdapterFile:
    """Find an adapter file, downloading it where it is on the hub.

    Args:
        adapter: A .safetensors file, a folder with one, a hub repository ("owner/name") with one,
            or one file of a hub repository ("owner/name/file.safetensors"). Where there is no
            .safetensors file, a pickle (.pt, .bin, .ckpt, ...) is taken.
        hub_options: Those of `HUB_OPTIONS` that apply.

    Raises:
        AdapterError: Nothing is there, or a folder or repository has none or several.
    """
    path = Path(adapter).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return AdapterFile(path, _existing(path.parent / SIDECAR_NAME))
    repository, _, file = _split_hub_name(str(adapter))
    if repository is None:
        raise AdapterError(
            f"{adapter}: there is no such file or folder, and it is not a hub name; give a "
            '.safetensors file, a folder with one, or "owner/name" on the hub'
        )
    return _on_hub(repository, file, dict(hub_options or {}))


def find_base_sidecar(
    base: str | Path, hub_options: Mapping[str, Any] | None = None
) -> Path | None:
    """The recipe beside a base model, a local folder or a hub repository; None without one."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return _existing(folder / SIDECAR_NAME)
    repository, _, rest = _split_hub_name(str(base))
    if repository is None or rest:
        return None
    return _hub_sidecar(repository, "", dict(hub_options or {}))


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def adapters_among(names: Iterable[str]) -> list[str]:
    """Files that may be adapters, sorted: the .safetensors ones, or else the pickles."""
    known = sorted(names)
    return [name for name in known if name.endswith(SUFFIX)] or [
        name for name in known if name.lower().endswith(PICKLE_SUFFIXES)
    ]


def listed(names: Sequence[str]) -> str:
    """ "3 .safetensors files here (a.safetensors, ...)", for messages."""
    kind = SUFFIX if names[0].endswith(SUFFIX) else "pickle"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} {kind} files here ({shown})"


def _in_folder(folder: Path) -> AdapterFile:
    names = adapters_among(file.name for file in folder.iterdir() if file.is_file())
    if len(names) != 1:
        raise AdapterError(_not_one(str(folder), names))
    return AdapterFile(folder / names[0], _existing(folder / SIDECAR_NAME))


def _not_one(where: str, names: list[str]) -> str:
    if not names:
        return f"{where}: no .safetensors file here; give the adapter file itself"
    return f"{where}: {listed(names)}; name the one you mean"


def _split_hub_name(name: str) -> tuple[str | None, str, str]:
    """ "owner/name/a/b.safetensors" -> ("owner/name", "/", "a/b.safetensors")."""
    parts = name.split("/")
    if len(parts) < 2 or "\\" in name or any(part in ("", ".", "..", "~") for part in parts):
        return None, "", ""
    if len(parts) == 2 and name.endswith((SUFFIX, *PICKLE_SUFFIXES)):
        return None, "", ""  # a relative path that does not exist
    return "/".join(parts[:2]), "/", "/".join(parts[2:])


def _on_hub(repository: str, file: str, options: dict[str, Any]) -> AdapterFile:
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if not file and options.get("local_files_only"):
            return _in_folder(Path(snapshot_download(repository, **options)))
        if not file:
            known = list_repo_files(
                repository, revision=options.get("revision"), token=options.get("token")
            )
            names = adapters_among(name for name in known if "/" not in name)
            if len(names) != 1:
                raise AdapterError(_not_one(repository, names))
            file = names[0]
        path = Path(hf_hub_download(repository, file, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"{repository}/{file}: not found on this machine or the hub ({reason}); check the name"
        ) from error
    folder = file.rpartition("/")[0]
    return AdapterFile(path, _hub_sidecar(repository, folder, options))


def _hub_sidecar(repository: str, folder: str, options: dict[str, Any]) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    name = f"{folder}/{SIDECAR_NAME}" if folder else SIDECAR_NAME
    try:
        return Path(hf_hub_download(repository, name, **options))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError, OfflineModeIsEnabled):
        return None  # what else is missing is told by whoever loads the model
