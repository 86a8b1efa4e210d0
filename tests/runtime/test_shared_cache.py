"""Several threads, processes and containers on one cache: each writes whole, under its own name."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fewstep.runtime.cache_folder import (
    FORGOTTEN_S,
    clear_partials,
    partial_name,
    whole_file,
    write_whole,
)
from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.digits_exports import exported

PROMPT, THREADS = "a handwritten seven", 4
RACE = f"""
import os, sys, threading
from pathlib import Path
import numpy as np
from fewstep.runtime.few_step_runtime import FewStepRuntime

def draw(index):
    start.wait()
    found[index] = loaded[index]({PROMPT!r}, seed=5).pixels

folder, engine, root, rounds = sys.argv[1:]
drawn = []
for number in range(int(rounds)):
    os.environ["FEWSTEP_CACHE"] = str(Path(root) / str(number))
    loaded = [FewStepRuntime.load(folder, provider=engine, threads=1) for _ in range({THREADS})]
    start, found = threading.Barrier({THREADS}), [None] * {THREADS}
    threads = [threading.Thread(target=draw, args=(index,)) for index in range({THREADS})]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drawn += found
np.save(Path(root) / "drawn.npy", np.concatenate(drawn))
"""


@pytest.mark.parametrize(
    ("engine", "kept", "rounds"), [("cpu", "graphs", 8), ("openvino", "openvino", 2)]
)
def test_several_threads_make_one_copy(engine: str, kept: str, rounds: int, tmp_path: Path) -> None:
    """In a process of its own: what is cut short while it is mapped ends the whole process."""
    if engine == "openvino":
        pytest.importorskip("openvino")
    folder = exported("sd3").folder
    loaded = FewStepRuntime.load(folder, provider=engine, threads=1, has_cache=False)
    wanted = loaded(PROMPT, seed=5).pixels
    command = [sys.executable, "-c", RACE, str(folder), engine, str(tmp_path), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "drawn.npy")
    assert len(found) == rounds * THREADS
    assert all(np.array_equal(one, wanted[0]) for one in found)
    for number in range(rounds):
        left = [path.name for path in (tmp_path / str(number) / kept).iterdir()]
        assert len(left) == 4  # two text encoders, transformer, decoder
        assert not [name for name in left if "partial" in name]


def test_writers_of_one_file_do_not_see_each_other(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    both_open = threading.Barrier(2)

    def write(text: str) -> None:
        with whole_file(target) as partial:
            partial.write_text(text)
            both_open.wait(10)
            assert partial.read_text() == text

    threads = [threading.Thread(target=write, args=(text * 1000,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [target]


def test_names_beside_a_file_differ_and_keep_its_ending(tmp_path: Path) -> None:
    names = {partial_name(tmp_path / "picture.png") for _ in range(100)}
    assert len(names) == 100
    assert {name.suffix for name in names} == {".png"}
    assert {name.parent for name in names} == {tmp_path}


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.usefixtures("narrow_umask")
def test_permissions_are_those_of_a_plain_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", "whole")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    FewStepRuntime.load(exported("sd3").folder, provider="cpu", threads=1)(PROMPT)
    for copy in (tmp_path / "cache" / "graphs").iterdir():
        assert copy.stat().st_mode & 0o777 == 0o750


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, young, busy = (partial_name(tmp_path / name) for name in ("old", "young", "busy"))
    file, others = partial_name(tmp_path / "copy.blob"), tmp_path / ".hidden"
    for folder in (old, young, busy):
        folder.mkdir()
        (folder / "model.onnx_data").write_bytes(b"half")
    file.write_bytes(b"half")
    others.write_bytes(b"")
    long_ago = time.time() - FORGOTTEN_S - 60
    for path in (old / "model.onnx_data", old, busy, file, others):
        os.utime(path, (long_ago, long_ago))
    clear_partials(tmp_path)
    assert set(tmp_path.iterdir()) == {young, busy, others}  # busy: its data is being written
    clear_partials(tmp_path / "missing")
