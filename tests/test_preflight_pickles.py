"""Pickles: what torch's restricted reader makes of them, nothing run, nothing unpacked unseen."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fewstep.adapters.opening import open_adapter
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
def test_pickles_are_read_as_torch_reads_them(tmp_path: Path, is_zip: bool, nested: bool) -> None:
    """Same names, dtypes, shapes and bits as `torch.load(weights_only=True)`."""
    block = torch.randn(10, 4)
    tensors = lora(
        bf16=torch.randn(3, 5).bfloat16(),
        fp16=torch.randn(3, 5).half(),
        double=torch.randn(2, dtype=torch.float64),
        integer=torch.tensor([1, -2, 3]),
        bool=torch.tensor([True, False]),
        scalar=torch.tensor(2.5),
        window=block[2:5],
        same_memory=block[2:5],
        transposed=torch.randn(3, 2).T,
        every_second=torch.randn(8)[::2],
        expanded=torch.randn(1).expand(5),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
    )
    if is_zip:  # torch cannot read its own older files of it
        tensors["float8"] = torch.randn(3).to(torch.float8_e4m3fn)
    path = tmp_path / "adapter.pt"
    content = {"state_dict": tensors, "epoch": 3, "note": None} if nested else tensors
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    header = open_adapter(path)
    assert (header.container, header.path) == ("pickle", path)
    assert header.num_bytes == path.stat().st_size
    assert header.read_scalars(["scalar"]) == {"scalar": 2.5}
    loaded = torch.load(path, weights_only=True)
    loaded = loaded["state_dict"] if nested else loaded
    written = safetensors.torch.load_file(header.tensor_file)
    assert set(written) == set(loaded) == set(header.tensors)
    for name, values in loaded.items():
        assert written[name].dtype == values.dtype
        assert torch.equal(written[name].float(), values.float())


def test_a_module_s_state_dict_is_read_and_its_metadata_passed_over(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    torch.save(model.state_dict(), tmp_path / "a.bin")
    shapes = {n: i.shape for n, i in open_adapter(tmp_path / "a.bin").tensors.items()}
    assert shapes == {n: tuple(v.shape) for n, v in model.state_dict().items()}


def test_negated_views_are_written_as_they_read(tmp_path: Path) -> None:
    """A view may carry its sign as a mark beside the numbers."""
    negated = torch._neg_view(torch.tensor([1.0, 2.0]))
    torch.save({"a": negated}, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)["a"]
    header = open_adapter(tmp_path / "a.pt")
    assert torch.equal(safetensors.torch.load_file(header.tensor_file)["a"], loaded)


def test_copies_are_private_made_once_and_read_without_torch(
    tmp_path: Path, own_assets: Path
) -> None:
    path = tmp_path / "wan2.2_high_noise.pt"
    torch.save(lora(), path)
    first = open_adapter(path)
    stamp = first.tensor_file.stat().st_mtime_ns
    assert open_adapter(path) == first
    assert first.tensor_file.stat().st_mtime_ns == stamp
    assert [file.name for file in own_assets.rglob("*")] == [first.tensor_file.name]
    if os.name == "posix":
        assert first.tensor_file.stat().st_mode & 0o077 == 0
    code = (
        "import sys, json; from pathlib import Path; from fewstep.adapters import open_adapter; "
        f"header = open_adapter(Path({str(path)!r}), cache=Path({str(own_assets)!r})); "
        "print(json.dumps([len(header.tensors), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [4, False]


def test_changed_content_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "a.pt")
    first = open_adapter(tmp_path / "a.pt")
    torch.save(lora(more=torch.ones(1)), tmp_path / "a.pt")
    assert set(open_adapter(tmp_path / "a.pt").tensors) - set(first.tensors) == {"more"}


def test_without_torch_the_extra_is_named(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "a.pt")
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path\n"
        "from fewstep.adapters import open_adapter; from fewstep.errors import MissingExtraError\n"
        f"try: open_adapter({str(tmp_path / 'a.pt')!r}, cache=Path({str(tmp_path)!r}))\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'torch is not installed; run: pip install "fewstep[torch]"\n'


def test_a_copy_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "a.pt")
    (tmp_path / "in_the_way").write_text("a file")
    with pytest.raises(AdapterError, match="a.pt: a safetensors copy cannot be written to"):
        open_adapter(tmp_path / "a.pt", cache=tmp_path / "in_the_way")


def test_a_damaged_copy_is_named_with_its_original(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "a.pt")
    copy = open_adapter(tmp_path / "a.pt").tensor_file
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="a.pt: its safetensors copy cannot be used .*cut short"):
        open_adapter(tmp_path / "a.pt")


class Runs:
    """Unpickled the usual way, this runs a command that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"echo > {self.path}",)


@LAYOUTS
def test_code_in_a_pickle_is_not_run(tmp_path: Path, is_zip: bool) -> None:
    trace = tmp_path / "ran"
    torch.save(
        lora() | {"x": Runs(trace)}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip
    )
    with pytest.raises(AdapterError) as caught:
        open_adapter(tmp_path / "a.pt")
    assert not trace.exists()
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.pt'}: torch.load(weights_only=True) refuses it (")
    assert f"{os.system.__module__}.system" in text
    assert text.endswith("; ask for a .safetensors file")
    assert "weights_only=False" not in text, "torch's advice to run it all the same"


def refused() -> dict[str, tuple[Any, str]]:
    """What torch.save writes -> what is said of it."""
    return {
        "whole model": (torch.nn.Linear(2, 2), "refuses it (Unsupported global"),
        "path": ({"a": Path("x")}, "refuses it (Unsupported "),
        "list": ([torch.zeros(1)], "holds no dictionary of tensors"),
        "tensor": (torch.zeros(1), "holds no dictionary of tensors"),
        "empty": ({}, "holds no dictionary of tensors"),
        "number among tensors": (lora() | {"step": 3}, "holds 'step', which is not a tensor"),
        "nested otherwise": ({"model": lora()}, "holds 'model', which is not a tensor"),
        "two states": (
            {"state_dict": lora(), "ema": lora()},
            "has 'ema' beside its 'state_dict'",
        ),
        "expanded": ({"a": torch.zeros(1).expand(10**12)}, "claims 4000000000000 bytes of tensors"),
        "windows": (dict.fromkeys(map(str, range(1000)), torch.zeros(10_000)), "claims 40000000 "),
        "sparse": ({"a": torch.zeros(2).to_sparse()}, "which is sparse, quantised or the like"),
        "meta": ({"a": torch.zeros(2, device="meta")}, "which is sparse, quantised or the like"),
        "complex128": ({"a": torch.zeros(2, dtype=torch.complex128)}, "cannot be written"),
        "number keys": ({1: torch.zeros(1)}, "holds 1, which is not a tensor"),
        "other keys": ({(1, 2): torch.zeros(1)}, "holds a key of type tuple"),
        "header key": ({"__metadata__": torch.zeros(1)}, "holds '__metadata__'"),
        "half a letter": ({"\ud800": torch.zeros(1)}, "surrogates not allowed"),
    }


@pytest.mark.parametrize("kind", refused())
def test_other_pickles_are_refused_in_one_sentence(
    tmp_path: Path, own_assets: Path, kind: str
) -> None:
    content, message = refused()[kind]
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(AdapterError) as caught:
        open_adapter(tmp_path / "a.ckpt")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.ckpt'}: ")
    assert message in text
    assert "\n" not in text
    assert not list(own_assets.rglob("*"))


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
    "no program": (lambda n, d: None if n.endswith("data.pkl") else d, "refuses it ("),
    "no storage": (lambda n, d: None if n.endswith("data/0") else d, "refuses it ("),
    "plain pickle inside": (
        lambda n, d: pickle.dumps({"a": 1}, 2) if n.endswith("data.pkl") else d,
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


def test_one_changed_bit_among_the_numbers_is_noticed(tmp_path: Path) -> None:
    """torch itself maps the numbers unchecked; the archive has checksums."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.full((100,), 0.25)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\x80\x3e" * 100) + 200] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True, mmap=True)["a"].unique().numel() == 2
    with pytest.raises(AdapterError, match="does not have its checksum, so it is damaged"):
        open_adapter(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4_000_000)}, tmp_path / "good.pt")
    bomb = rezipped(tmp_path / "good.pt", tmp_path / "bomb.pt", lambda n, d: d, compress=True)
    assert bomb.stat().st_size < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="compressed archive of 16.* bytes in"):
            open_adapter(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # 16 MB unpacked
    finally:
        tracemalloc.stop()


def test_files_beyond_the_limit_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(lora(), tmp_path / "a.pt")
    monkeypatch.setattr("fewstep.adapters.pickle_files.MAX_FILE_BYTES", 1000)
    with pytest.raises(AdapterError, match=r"bytes .limit 1000., too many"):
        open_adapter(tmp_path / "a.pt")


FILES = {
    "missing": (None, "there is no such file"),
    "zero bytes": (b"", "is empty (0 bytes)"),
    "web page": (b"<!DOCTYPE html>" + bytes(99), "is no pickle in spite of its name"),
    "cut zip": (b"PK\x03\x04" + bytes(99), "refuses it (File is not a zip file)"),
    "cut pickle": (b"\x80\x02}q\x00X\x01\x00", "refuses it ("),
    "another pickle": (pickle.dumps({"a": 1}, 2), "refuses it ("),
    "endless pickle": (b"\x80\x02" + b"N" * 1_000_000, "refuses it ("),
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
