"""webdataset shards: plain tar files in which the members of one stem make one sample.

Read with the standard library, not with the `webdataset` package: that one is made to stream
shards once through a pipeline, while here every picture is measured first and decoded later, out of
order, bucket by bucket, and an error must name shard and member. A tar index of offsets does that;
tests/trainer/test_data_images.py holds that `webdataset` finds the same samples.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import ConfigError
from fewstep.trainer.data.pictures import SUFFIXES, Picture, Place, measured
from fewstep.trainer.data.rows import BadRowError, BadRows, Row, checked_text, known_key
from fewstep.trainer.data.text_rows import BOM

Members = dict[str, tarfile.TarInfo]
"""Extension without its dot, lower case -> member, of one stem."""


def shard_pictures(shard: Path, column: str, bad: BadRows) -> Iterator[Picture]:
    """The pictures of a shard in the order of their stems.

    A stem is the path up to the first dot of the file name, as webdataset has it.

    Args:
        shard: An uncompressed .tar file.
        column: The caption's key in .json members; "" takes .txt members where there are any,
            then prompt, text or caption of .json ones.
        bad: Meets samples without picture or caption, and a shard that ends too early.

    Raises:
        ConfigError: No tar file.
    """
    try:
        archive = tarfile.open(shard, "r:")
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(
            f"{shard} cannot be read as an uncompressed tar file ({error}); unpack or replace it"
        ) from error
    modified_ns = shard.stat().st_mtime_ns
    with archive:
        for stem, members in _samples(archive, shard, bad).items():
            try:
                yield _picture(archive, shard, stem, members, column, modified_ns)
            except BadRowError as error:
                bad.meet(error)


def _samples(archive: tarfile.TarFile, shard: Path, bad: BadRows) -> dict[str, Members]:
    """Stem -> its members, in order of appearance."""
    samples: dict[str, Members] = {}
    try:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            base, dot, extension = name.partition(".")
            if not member.isfile() or not base or not dot:
                continue  # folders, links, hidden files and files without a kind: as webdataset
            stem = f"{folder}/{base}" if folder else base
            extension = extension.lower()
            if extension in samples.setdefault(stem, {}):
                where = f"{shard}, member {member.name}"
                bad.meet(BadRowError(where, "is there twice; every stem needs its own name"))
                continue
            samples[stem][extension] = member
    except tarfile.TarError as error:
        bad.meet(BadRowError(str(shard), f"ends too early or is damaged ({error})"))
    return samples


def _picture(
    archive: tarfile.TarFile,
    shard: Path,
    stem: str,
    members: Members,
    column: str,
    modified_ns: int,
) -> Picture:
    kinds = [kind for kind in members if f".{kind}" in SUFFIXES]
    if len(kinds) != 1:
        found = ", ".join(members)
        raise BadRowError(
            f"{shard}, member {stem}.*", f"has {len(kinds)} pictures, wanted one (it has: {found})"
        )
    caption = _caption(archive, shard, stem, members, column)
    member = members[kinds[0]]
    place = Place(
        file=shard,
        name=f"{shard.name}/{member.name}",
        start=member.offset_data,
        num_bytes=member.size,
        modified_ns=modified_ns,
        member=member.name,
    )
    return measured(place, caption)


def _caption(
    archive: tarfile.TarFile, shard: Path, stem: str, members: Members, column: str
) -> str:
    if "txt" in members and not column:
        member = members["txt"]
        return checked_text(
            _text(archive, shard, member), f"{shard}, member {member.name}", "the caption"
        )
    if "json" not in members:
        wanted = ".json" if column else ".txt or .json"
        raise BadRowError(f"{shard}, member {stem}.*", f"has no caption, wanted {stem}{wanted}")
    member = members["json"]
    where = f"{shard}, member {member.name}"
    try:
        found = json.loads(_text(archive, shard, member))
    except (ValueError, RecursionError) as error:
        raise BadRowError(where, f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadRowError(where, f"is a {type(found).__name__}; wanted an object with a caption")
    return Row(where, found).text(column or known_key(found))


def _text(archive: tarfile.TarFile, shard: Path, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    assert file is not None  # regular files only
    with file:
        try:
            return file.read().removeprefix(BOM).decode("utf-8", "surrogateescape")
        except tarfile.TarError as error:
            where = f"{shard}, member {member.name}"
            raise BadRowError(where, f"cannot be read ({error})") from error
