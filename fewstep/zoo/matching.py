"""Which entry of the zoo a file or a base model is.

What is certain is applied: the repository it was downloaded from, its sha256, or its fingerprint
together with its first bytes. A distinctive file name alone is applied with a warning. Everything
less (similar names, equal shapes) only makes candidates for a message: all LoRAs of one rank and
target list share their names and shapes, so a wrong guess there would be a wrong picture.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewstep.adapters.families import KNOWN, guess_family
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.modules import lora_modules
from fewstep.errors import AdapterError
from fewstep.zoo.catalogue import entries
from fewstep.zoo.digests import file_sha256, fingerprint, head_digest
from fewstep.zoo.entry import ZooEntry, ZooFile

WHOLE_MODELS = ("checkpoint", "denoiser")
"""Kinds that are no adapters: a style LoRA that lies in a folder of theirs is none of them."""
UNETS = {"sd15", "sd2", "sdxl"}
"""Names of a small UNet adapter may not tell these apart; its shapes do when it is attached."""
_CACHE_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)")
_COMMON_WORDS = frozenset(
    "adapter beta bf16 bin base checkpoint converted denoiser diffusers diffusion distill "
    "distilled flux fp16 fp32 fp8 hidream high last light lora loras low ltx model module motion "
    "new noise pixart pytorch qwen image rank sana sd sd1 sd15 sd2 sd21 sd3 sd35 sdxl step steps "
    "t2v i2v transformer turbo unet v video wan weights xl z".split()
)
"""Words that many files have; a name of these alone says nothing."""
_COUNT = re.compile(r"v?\d+|\d+(?:steps?|p|b)|rank\d+|r\d+|wan2\d*")
"""Numbers of steps, versions, ranks, resolutions: the same."""

How = Literal["repository", "sha256", "fingerprint", "file name"]


@dataclass(frozen=True, slots=True)
class ZooMatch:
    """An entry, the file of it that was found, and by what.

    Attributes:
        entry: The entry.
        file: Which of its files.
        how: By what; "file name" is the only one that could be a coincidence.
    """

    entry: ZooEntry
    file: ZooFile
    how: How


@dataclass(frozen=True, slots=True)
class Origin:
    """A file's place on the hub: "owner/name" and its path in the repository ("" for all)."""

    repo: str
    filename: str


def match_adapter(
    header: AdapterHeader, known: Sequence[ZooEntry] | None = None
) -> ZooMatch | None:
    """The entry an adapter file is, by what is certain first; None without any.

    Args:
        header: Of the file; its path tells where it was downloaded from.
        known: Entries to look among; None means the whole zoo.
    """
    known = entries() if known is None else known
    origins = origins_of(header.path)
    return (
        _by_origin(origins, known)
        or _by_sha256(header.path, known)
        or _by_fingerprint(header, known)
        or _by_name(header, known)
    )


def match_base(base: str | Path, known: Sequence[ZooEntry] | None = None) -> ZooMatch | None:
    """The checkpoint that a base model is, by its repository; None without any.

    Args:
        base: Hub name, or a folder (of the hub's cache, or one that ends in owner/name).
        known: Entries to look among; None means the whole zoo.
    """
    known = entries() if known is None else known
    repos = {origin.repo for origin in origins_of(Path(base)) if not origin.filename}
    for found in known:
        if found.kind == "checkpoint":
            for file in found.files:
                if file.filename is None and any(map(file.is_in, repos)):
                    return ZooMatch(found, file, "repository")
    return None


def origins_of(path: Path) -> list[Origin]:
    """Where on the hub a path may come from: the hub's cache says, else its last folders."""
    parts = path.parts
    for index, part in enumerate(parts):
        cached = _CACHE_FOLDER.fullmatch(part)
        if cached and index + 2 < len(parts) and parts[index + 1] == "snapshots":
            return [Origin("/".join(cached.groups()), "/".join(parts[index + 3 :]))]
    found = []
    for index in range(len(parts) - 1):
        found.append(Origin("/".join(parts[index : index + 2]), "/".join(parts[index + 2 :])))
    return found


def _by_origin(origins: Sequence[Origin], known: Sequence[ZooEntry]) -> ZooMatch | None:
    """The path in the repository, else the file name where only one entry has it there."""
    at, named, whole = [], [], []
    for found in known:
        for file in found.files:
            for origin in origins:
                if not file.is_in(origin.repo) or not origin.filename:
                    continue
                match = ZooMatch(found, file, "repository")
                if file.is_at(origin.filename):
                    at.append(match)
                if file.is_named(origin.filename.rpartition("/")[2]):
                    named.append(match)
                if file.filename is None and found.kind not in WHOLE_MODELS:
                    whole.append(match)
    for matches in (at, named, whole):
        if len({match.entry.name for match in matches}) == 1:
            return matches[0]
    return None


def _by_sha256(path: Path, known: Sequence[ZooEntry]) -> ZooMatch | None:
    listed = [(e, f) for e in known for f in e.files if f.sha256 is not None]
    if not listed:
        return None  # reading a large file only to compare it with nothing
    digest = file_sha256(path)
    hits = [(e, f) for e, f in listed if f.sha256 == digest]
    return ZooMatch(*hits[0], "sha256") if hits else None


def _by_fingerprint(header: AdapterHeader, known: Sequence[ZooEntry]) -> ZooMatch | None:
    listed = [(e, f) for e in known for f in e.files if f.fingerprint and f.head]
    digest = fingerprint(header) if listed else None
    listed = [(e, f) for e, f in listed if f.fingerprint == digest]
    if not listed:
        return None
    head = head_digest(header)
    hits = [(e, f) for e, f in listed if f.head == head]
    return ZooMatch(*hits[0], "fingerprint") if hits else None


def _by_name(header: AdapterHeader, known: Sequence[ZooEntry]) -> ZooMatch | None:
    name = header.path.name
    if not is_distinctive(name):
        return None
    named = [(e, f) for e in known for f in e.files if f.is_named(name)]
    # A pattern may be all stars; then it is no name at all.
    hits = [(e, f) for e, f in named if is_distinctive((f.basename or "").replace("*", " "))]
    if len({found.name for found, _ in hits}) != 1:
        return None
    return ZooMatch(*hits[0], "file name") if is_of_family(hits[0][0], family_of(header)) else None


def is_distinctive(name: str) -> bool:
    """Whether a file name says more than "a LoRA of so many steps for this base"."""
    words = re.split(r"[^a-z0-9]+", Path(name).stem.lower())
    return any(len(w) > 2 and w not in _COMMON_WORDS and not _COUNT.fullmatch(w) for w in words)


def family_of(header: AdapterHeader) -> str | None:
    """The family a file's names look like, where they are a LoRA's of a known one."""
    try:
        guess = guess_family(lora_modules(header))
    except AdapterError:
        return None
    return guess if guess in KNOWN else None


def is_of_family(found: ZooEntry, family: str | None) -> bool:
    """Whether an entry may be of this family; yes where either is not known well enough."""
    if family is None or found.family not in KNOWN:
        return True
    return family == found.family or {family, found.family} <= UNETS
