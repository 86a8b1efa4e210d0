"""Entries that look like a file or a base model: for messages only, never applied."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.adapters.header import AdapterHeader
from fewstep.zoo.catalogue import entries
from fewstep.zoo.digests import fingerprint
from fewstep.zoo.entry import ZooEntry, ZooFile
from fewstep.zoo.matching import family_of, is_of_family, origins_of

MAX_CANDIDATES = 3
SIMILAR = 0.8
"""How alike two file names must be (difflib's ratio) to be worth a mention."""
SIMILAR_BASE = 0.9
"""The same for base models, whose names differ less from each other."""


def likely_entries(
    header: AdapterHeader | None,
    base: str | Path | None = None,
    known: Sequence[ZooEntry] | None = None,
) -> tuple[ZooEntry, ...]:
    """Entries that a message may name: equal shapes, or a similar file or folder name.

    Args:
        header: Of an adapter file, where there is one; the base then says nothing.
        base: Hub name or folder of a base model.
        known: Entries to look among; None means the whole zoo.

    Returns:
        At most three, the likeliest first.
    """
    known = entries() if known is None else known
    ranks = _ranks_of_base(Path(base or ""), known) if header is None else _ranks(header, known)
    likely = [found for found in known if ranks.get(found.name, 0.0) > 0.0]
    return tuple(sorted(likely, key=lambda e: (-ranks[e.name], e.name))[:MAX_CANDIDATES])


def _ranks(header: AdapterHeader, known: Sequence[ZooEntry]) -> dict[str, float]:
    digest, family, name = fingerprint(header), family_of(header), header.path.name
    ranks: dict[str, float] = {}
    for found in known:
        if is_of_family(found, family):
            ranks[found.name] = max(
                (_rank(file, name, digest) for file in found.files), default=0.0
            )
    return ranks


def _rank(file: ZooFile, name: str, digest: str) -> float:
    if file.fingerprint == digest:
        return 2.0
    if file.is_named(name):
        return 1.0
    return _likeness(name, file.basename or file.repo.partition("/")[2], SIMILAR)


def _ranks_of_base(base: Path, known: Sequence[ZooEntry]) -> dict[str, float]:
    repos = {origin.repo.lower() for origin in origins_of(base)}
    if any(name.lower() in repos for found in known for name in found.base):
        return {}  # a plain base that LoRAs are made for
    ranks: dict[str, float] = {}
    for found in known:
        names = [f.repo.partition("/")[2] for f in found.files if f.filename is None]
        likeness = [_likeness(base.name, name, SIMILAR_BASE) for name in names]
        if found.kind == "checkpoint":
            ranks[found.name] = max(likeness, default=0.0)
    return ranks


def _likeness(ours: str, theirs: str, least: float) -> float:
    pair = [re.sub(r"[^a-z0-9]+", "", re.sub(r"\.\w+$", "", t.lower())) for t in (ours, theirs)]
    if len(min(pair, key=len)) < 6:
        return 0.0
    matcher = difflib.SequenceMatcher(None, *pair, autojunk=False)
    return ratio if (ratio := matcher.ratio()) >= least else 0.0
