"""Pickles are read as data: what torch reads of them, nothing run, nothing unpacked unseen."""

import os
import pickle
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fewstep.adapters.opening import open_adapter, safetensors_copy
from fewstep.errors import AdapterError


def lora(**more: Any) -> dict[str, Any]:
    """Rank 4 on two layers, random."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    for name in ("transformer.blocks.0.to_q", "transformer.blocks.1.to_q"):
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 16, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    return tensors | more


LAYOUTS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
NESTINGS = pytest.mark.parametrize("nested", [False, True], ids=["flat", "state_dict"])


@LAYOUTS
@NESTINGS
def test_pickles_are_read_without_torch_as_torch_reads_them(
    tmp_path: Path, is_zip: bool, nested: bool
) -> None:
    """Same names, dtypes, shapes and bits as `torch.load(weights_only=True)`."""
    tensors = lora(
        bf16=torch.randn(3, 5).bfloat16(),
        fp16=torch.randn(3, 5).half(),
        double=torch.randn(2, dtype=torch.float64),
        integer=torch.tensor([1, -2, 3]),
        bool=torch.tensor([True, False]),
        scalar=torch.tensor(2.5),
        window=torch.randn(10, 4)[2:5],
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
    )
    path = tmp_path / "adapter.pt"
    content = {"state_dict": tensors, "epoch": 3, "note": None} if nested else tensors
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    header = open_adapter(path)
    assert header.container == "pickle"
    assert header.read_scalars(["scalar"]) == {"scalar": 2.5}
    copy = safetensors_copy(header, tmp_path / "cache")
    loaded = torch.load(path, weights_only=True)
    loaded = loaded["state_dict"] if nested else loaded
    written = safetensors.torch.load_file(copy.path)
    assert set(written) == set(loaded) == set(header.tensors)
    for name, values in loaded.items():
        assert written[name].dtype == values.dtype
        assert torch.equal(written[name], values)


def test_a_module_s_state_dict_is_read_and_its_metadata_passed_over(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(model.state_dict(), tmp_path / "a.bin")
    shapes = {n: i.shape for n, i in open_adapter(tmp_path / "a.bin").tensors.items()}
    assert shapes == {n: tuple(v.shape) for n, v in model.state_dict().items()}


def test_copies_are_private_made_once_and_named_like_the_file(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "wan2.2_high_noise.pt")
    header = open_adapter(tmp_path / "wan2.2_high_noise.pt")
    first = safetensors_copy(header, tmp_path / "cache")
    stamp = first.path.stat().st_mtime_ns
    assert safetensors_copy(header, tmp_path / "cache").path == first.path
    assert first.path.stat().st_mtime_ns == stamp
    assert first.path.name == "wan2.2_high_noise.safetensors"
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 1
    if os.name == "posix":
        assert first.path.stat().st_mode & 0o077 == 0
    assert safetensors_copy(first) is first


def test_a_copy_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "a.pt")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(AdapterError, match="a safetensors copy cannot be written to"):
        safetensors_copy(open_adapter(tmp_path / "a.pt"), tmp_path / "cache")


class Runs:
    """Unpickled the usual way, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@LAYOUTS
def test_code_in_a_pickle_is_not_run(tmp_path: Path, is_zip: bool) -> None:
    trace = tmp_path / "ran"
    torch.save(
        lora() | {"x": Runs(trace)}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip
    )
    with pytest.raises(AdapterError, match="asks to call '(io|_io|builtins).open'"):
        open_adapter(tmp_path / "a.pt")
    assert not trace.exists()


def refused() -> dict[str, tuple[Any, str]]:
    """What torch.save writes -> what is said of it."""
    return {
        "whole model": (torch.nn.Linear(2, 2), "instruction NEWOBJ"),
        "list": ([torch.zeros(1)], "holds no dictionary of tensors"),
        "tensor": (torch.zeros(1), "holds no dictionary of tensors"),
        "empty": ({}, "holds no dictionary of tensors"),
        "number among tensors": (lora() | {"step": 3}, "holds 'step', which is not a tensor"),
        "nested otherwise": ({"model": lora()}, "holds 'model', which is not a tensor"),
        "two states": (
            {"state_dict": lora(), "ema": lora()},
            "has 'ema' beside its 'state_dict'",
        ),
        "transposed": ({"a": torch.zeros(3, 2).T}, "transposed (strides [1, 2])"),
        "expanded": ({"a": torch.zeros(1).expand(10**12)}, "gaps or transposed|a storage of 1"),
        "sparse": ({"a": torch.zeros(2).to_sparse()}, "asks to call"),
        "float8": ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "has a storage of type"),
        "number keys": ({1: torch.zeros(1)}, "holds 1, which is not a tensor"),
        "header key": ({"__metadata__": torch.zeros(1)}, "holds '__metadata__'"),
    }


@pytest.mark.parametrize("kind", refused())
def test_other_pickles_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    content, message = refused()[kind]
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(AdapterError) as caught:
        open_adapter(tmp_path / "a.ckpt")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.ckpt'}: this pickle file ")
    assert any(part in text for part in message.split("|"))
    assert "\n" not in text


def test_what_weights_only_refuses_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (Runs(tmp_path / "x"), torch.nn.Linear(2, 2), {"a": Path("x")}):
        torch.save(content, path)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
        with pytest.raises(AdapterError):
            open_adapter(path)
    assert not (tmp_path / "x").exists()


def rezipped(source: Path, target: Path, change: Any, *, compress: bool = False) -> Path:
    """The archive with its entries passed through `change(name, bytes) -> bytes | None`."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


ARCHIVES: dict[str, tuple[Any, str]] = {
    "no program": (lambda n, d: None if n.endswith("data.pkl") else d, "torch.save did not write"),
    "no storage": (
        lambda n, d: None if n.endswith("data/0") else d,
        "lacks numbers of its storage",
    ),
    "short storage": (lambda n, d: d[:-1] if n.endswith("data/1") else d, "lacks numbers"),
    "big endian": (lambda n, d: b"big" if n.endswith("byteorder") else d, "another byte order"),
    "plain pickle inside": (
        lambda n, d: pickle.dumps({"a": 1}, 5) if n.endswith("data.pkl") else d,
        "holds 'a', which is not a tensor",
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_damaged_archives_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    change, message = ARCHIVES[kind]
    torch.save(lora(), tmp_path / "good.pt")
    path = rezipped(tmp_path / "good.pt", tmp_path / "bad.pt", change)
    with pytest.raises(AdapterError) as caught:
        open_adapter(path)
    assert message in str(caught.value)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "good.pt")
    bomb = rezipped(tmp_path / "good.pt", tmp_path / "bomb.pt", lambda n, d: d, compress=True)
    assert bomb.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="compressed or encrypted"):
            open_adapter(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # 16 MB unpacked
    finally:
        tracemalloc.stop()


def test_many_windows_on_one_storage_cannot_explode_a_copy(tmp_path: Path) -> None:
    block = torch.zeros(10_000)
    torch.save({f"{i}": block for i in range(1000)}, tmp_path / "a.pt")
    with pytest.raises(AdapterError, match="claims 40000000 bytes of tensors in a file of"):
        open_adapter(tmp_path / "a.pt")


FILES = {
    "missing": (None, "there is no such file"),
    "zero bytes": (b"", "is empty (0 bytes)"),
    "web page": (b"<!DOCTYPE html>" + bytes(99), "is no pickle in spite of its name"),
    "cut zip": (b"PK\x03\x04" + bytes(99), "is a damaged zip archive"),
    "cut pickle": (b"\x80\x02}q\x00X\x01\x00", "is damaged: its instructions make no sense"),
    "another pickle": (pickle.dumps({"a": 1}, 2), "is not in a format of torch.save"),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_under_a_pickle_s_name(tmp_path: Path, kind: str) -> None:
    content, message = FILES[kind]
    path = tmp_path / "adapter.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        open_adapter(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_lie_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(safetensors.torch.save(lora()))
    with pytest.raises(AdapterError, match="rename it if it is a .safetensors file"):
        open_adapter(tmp_path / "a.pt")
    torch.save(lora(), tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="this is a pickle file"):
        open_adapter(tmp_path / "b.safetensors")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(AdapterError, match="this is a folder"):
        open_adapter(tmp_path / "folder.pt")


def test_a_header_of_millions_of_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    text = b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="the header has more than 2000000 values"):
            open_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(text)
    finally:
        tracemalloc.stop()


@LAYOUTS
def test_an_endless_pickle_is_given_up(tmp_path: Path, is_zip: bool) -> None:
    program = b"\x80\x02" + b"]" * 3_000_000 + b"."
    good, path = tmp_path / "good.pt", tmp_path / "a.pt"
    torch.save(lora(), good, _use_new_zipfile_serialization=is_zip)
    if is_zip:
        rezipped(good, path, lambda n, d: program if n.endswith("data.pkl") else d)
    else:
        path.write_bytes(b"\x80\x02" + b"N" * 3_000_000)
    with pytest.raises(AdapterError, match="has more than 1000000 instructions"):
        open_adapter(path)


SLOW_PROGRAMS = {  # each would take minutes if instructions walked over what others have built
    "dictionaries of a list": (
        b"ccollections\nOrderedDict\nq\x00]q\x01(" + b"h\x02" * 200_000 + b"eq\x03\x85q\x04",
        b"h\x00h\x04R",
    ),
    "storages of a tuple": (b"(" + b"N" * 200_000 + b"tq\x00", b"h\x00Q"),
    "names of nested tuples": (b")" + b"q\x00h\x00\x86" * 100_000 + b"q\x00", b"h\x00h\x00\x93"),
}


@pytest.mark.parametrize("kind", SLOW_PROGRAMS)
def test_programs_made_to_take_for_ever_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    start, again = SLOW_PROGRAMS[kind]
    program = b"\x80\x02)q\x02" + start + again * 200_000 + b"."
    torch.save(lora(), tmp_path / "good.pt")
    path = rezipped(
        tmp_path / "good.pt", tmp_path / "a.pt", lambda n, d: program if n.endswith(".pkl") else d
    )
    begin = time.process_time()
    with pytest.raises(AdapterError, match="its instructions make no sense"):
        open_adapter(path)
    assert time.process_time() - begin < 5.0
