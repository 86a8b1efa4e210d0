"""A mapped file's pages count as ours while they are read, and not once they are given back."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fewstep.runtime.mapped_blob import MappedBlob

SIZE_MIB = 64
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def blob(tmp_path: Path) -> MappedBlob:
    file = tmp_path / "blob"
    file.write_bytes(np.arange(SIZE_MIB << 20, dtype=np.uint8).tobytes())
    return MappedBlob(file)


def mapped_mib() -> float:
    """Pages of files in this process's memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def checked(blob: MappedBlob) -> bool:
    return bool((blob.values == np.arange(SIZE_MIB << 20, dtype=np.uint8)).all())


@LINUX
def test_pages_are_given_back_and_can_be_read_again(blob: MappedBlob) -> None:
    before = mapped_mib()
    assert checked(blob)
    assert mapped_mib() - before > 0.9 * SIZE_MIB
    blob.give_back()
    assert mapped_mib() - before < 0.1 * SIZE_MIB
    assert checked(blob)


@LINUX
def test_what_is_read_in_passing_is_gone_at_the_end(blob: MappedBlob) -> None:
    before = mapped_mib()
    with blob.passing():
        assert all(checked(blob) for _ in range(5))
    assert mapped_mib() - before < 0.1 * SIZE_MIB


def test_an_error_in_passing_comes_through(blob: MappedBlob) -> None:
    with pytest.raises(KeyError), blob.passing():
        raise KeyError("x")
    assert blob.values[300] == 300 % 256


@pytest.mark.parametrize("content", [None, b""])
def test_what_is_no_blob_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "blob").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        MappedBlob(tmp_path / "blob")
