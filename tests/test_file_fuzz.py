"""Ten thousand damaged files: our errors or success, never another exception, little memory.

Whatever is accepted must also be accepted by the format's own readers, with the same shapes.
"""

import io
import json
import math
import random
import struct
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fewstep.adapters import AdapterHeader, inspect_adapter, lora_modules
from fewstep.adapters.coverage import check_coverage
from fewstep.adapters.opening import open_adapter
from fewstep.adapters.preflight import preflight
from fewstep.adapters.values import check_dtypes, check_values
from fewstep.errors import AdapterError, FewstepError, RecipeError
from fewstep.recipe import METADATA_KEY, Base, FewStepRecipe, Grid, Sampler, Schedule

NUM_SAFETENSORS, NUM_PICKLES = 7_500, 2_500
NUM_TRACED = 500
"""Files of each kind during which every allocation is counted; that takes three times as long."""
PEAK_BYTES = 24_000_000
HANG_S = 60.0  # not how fast: a reader that hangs is killed here, on the slowest machine too
"""Of Python and numpy together while counted; the files have a few kB."""
GROWTH_BYTES = 150_000_000
"""Of the process over all files, as the system sees it."""
RECIPE = FewStepRecipe(
    base=Base(family="sd3", prediction="flow", schedule=Schedule(kind="flow", shift=1.0)),
    grids=(Grid(timesteps=(1000.0, 500.0), sigmas=(1.0, 0.5, 0.0)),),
    default_steps=2,
    sampler=Sampler(stochasticity=1.0),
)
STEM = "transformer_blocks.0.attn"
BASE = {
    f"{STEM}.to_q.weight": (8, 8),
    f"{STEM}.to_k.weight": (8, 8),
    f"{STEM}.to_v.weight": (8, 8),
    f"{STEM}.add_q_proj.weight": (8, 8),
    f"{STEM}.add_k_proj.weight": (8, 8),
    f"{STEM}.add_v_proj.weight": (8, 8),
    f"{STEM}.to_out.0.weight": (8, 8),
    f"{STEM}.to_add_out.weight": (8, 8),
    "transformer_blocks.0.ff.net.0.proj.weight": (8, 8),
    "transformer_blocks.0.ff_context.net.0.proj.weight": (8, 8),
    "pos_embed.proj.weight": (8, 4, 2, 2),
    "context_embedder.weight": (8, 8),
}
Tensor = tuple[str, list[int], bytes]
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**53, 2**63, -(2**63), 10**40, 1e308, 0.5),
    *(float("nan"), float("inf"), "", "x", "F16", "F8_E4M3", "I64", "BOOL", "C64", "\ud800"),
    *("\x1b[2J", "a" * 5000, "0", "1e999", [], {}, [[]], [0], [0, 0], [1] * 20, {"a": 1}),
    *([2**62, 2**62], [4, -8], [4.0, 8], [0, 2**40]),
]


def floats(*sizes: int) -> bytes:
    return struct.pack(f"<{math.prod(sizes)}f", *[0.25] * math.prod(sizes))


def pair(module: str, spelling: str) -> dict[str, Tensor]:
    down, up = ("lora_A.weight", "lora_B.weight")
    if spelling == "kohya":
        down, up = ("lora_down.weight", "lora_up.weight")
    return {
        f"{module}.{down}": ("F32", [2, 8], floats(2, 8)),
        f"{module}.{up}": ("F32", [8, 2], floats(8, 2)),
    }


def one(value: float = 1.0) -> Tensor:
    return ("F32", [], struct.pack("<f", value))


def originals() -> list[tuple[dict[str, str], dict[str, Tensor]]]:
    """Metadata and tensors of good files in four namings."""
    config = {"transformer.r": 2, "transformer.lora_alpha": 4}
    config_text = json.dumps(config | {"transformer.alpha_pattern": {"^a.*(": 2.0}})
    native = "diffusion_model.joint_blocks.0.x_block.attn.proj"
    flat = f"lora_unet_{STEM.replace('.', '_')}"
    return [
        (
            {METADATA_KEY: RECIPE.to_json(), "lora_adapter_metadata": config_text},
            pair(f"transformer.{STEM}.to_q", "peft") | pair(f"transformer.{STEM}.to_v", "peft"),
        ),
        (
            {"fewstep.phase": "high_noise", "ss_network_alpha": "4", "alpha": "2"},
            pair(f"{flat}_to_q", "kohya")
            | {f"{flat}_to_q.alpha": one(2.0), f"{flat}_to_v.alpha": one()}
            | pair(f"{flat}_to_v", "kohya")
            | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", "kohya"),
        ),
        (
            {METADATA_KEY: RECIPE.to_json()},
            pair(native, "kohya")
            | {
                f"{native}.alpha": ("BF16", [], b"\x80\x3f"),
                f"{native}.diff_b": ("F32", [8], floats(8)),
            }
            | {"diffusion_model.context_embedder.diff": ("F32", [8, 8], floats(8, 8))},
        ),
        (
            {},
            {
                f"{flat}_to_k.lokr_w1": ("F32", [2, 2], floats(2, 2)),
                f"{flat}_to_k.lokr_w2": ("F32", [4, 4], floats(4, 4)),
                f"{flat}_to_k.alpha": one(),
                **pair(f"{flat}_to_q", "kohya"),
                f"{flat}_to_q.dora_scale": ("F32", [8, 1], floats(8, 1)),
            },
        ),
    ]


def assembled(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        body += data
    return header, body


def packed(header: bytes, body: bytes, length: int | None = None) -> bytes:
    length = len(header) if length is None else length
    return struct.pack("<Q", length % 2**64) + header + body


# ---- mutations ----------------------------------------------------------------------------------


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bits, bytes, cuts or repeats."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) or 1)
        match rng.randrange(6):
            case 0 | 1 if changed:
                changed[at] ^= 1 << rng.randrange(8)
            case 2 if changed:
                changed[at] = rng.randrange(256)
            case 3:
                del changed[at : at + rng.randint(1, 64)]
            case 4:
                changed[at:at] = changed[at : at + rng.randint(1, 64)]
            case _:
                changed[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(changed)


def replaced_somewhere(value: Any, rng: random.Random) -> Any:
    """The same JSON with one node changed, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, str(rng.choice(HOSTILE))[:50]: rng.choice(HOSTILE)}
            case _:
                return {**value, key: replaced_somewhere(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], replaced_somewhere(value[at], rng), *value[at + 1 :]]
    return rng.choice(HOSTILE)


def with_edited_metadata(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One text of the metadata mutated: as JSON where it is JSON, else as letters."""
    metadata = dict(header["__metadata__"])
    if not metadata:
        return header
    key = rng.choice(list(metadata))
    try:
        content = json.loads(metadata[key])
        for _ in range(rng.randint(1, 2)):
            content = replaced_somewhere(content, rng)
        metadata[key] = json.dumps(content)
    except ValueError:
        metadata[key] = flipped(metadata[key].encode(), rng).decode("latin-1")
    return {**header, "__metadata__": metadata}


def with_renamed_tensor(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    old = rng.choice(names)
    swaps = [("lora_A", "lora_B"), ("down", "up"), ("transformer", "transformer_2"), ("0", "1")]
    new = old.replace(*rng.choice(swaps)) if rng.random() < 0.5 else None
    extra = ["", ".", "x" * 20_000, ".lora_A.weight", "\x00", ".alpha", "unet..to_q.alpha"]
    new = new or rng.choice([*extra, rng.choice(names)[:-2], old + rng.choice(extra)])
    return {(new if name == old else name): entry for name, entry in header.items()}


def with_lying_shapes(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Shapes, dtypes or offsets that may or may not agree with each other."""
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = dict(header[name])
    begin, end = entry["data_offsets"]
    match rng.randrange(5):
        case 0:
            entry["shape"] = entry["shape"][::-1]
        case 1:
            entry["shape"] = [
                rng.choice([0, 1, 2, 4, 16, 64, 2**40]) for _ in range(rng.randrange(5))
            ]
        case 2:
            wide, entry["dtype"] = rng.choice([(2, "F64"), (2, "I64"), (1, "I32"), (1, "U32")])
            if wide == 2 and entry["shape"]:
                entry["shape"] = [*entry["shape"][:-1], entry["shape"][-1] // 2]
        case 3:
            entry["data_offsets"] = [begin + rng.choice([-4, 0, 4]), end + rng.choice([-4, 0, 4])]
        case _:
            entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    return {**header, name: entry}


def with_poisoned_values(body: bytes, rng: random.Random) -> bytes:
    """NaN, infinities or anything in place of some numbers; alphas are among them."""
    changed = bytearray(body)
    for _ in range(rng.randint(1, 3)):
        at = 4 * rng.randrange(len(body) // 4)
        word = rng.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 4, bytes(4), rng.randbytes(4)]
        )
        changed[at : at + 4] = word
    return bytes(changed)


def damaged_safetensors(rng: random.Random) -> bytes:
    header, body = assembled(*rng.choice(ORIGINALS))
    for _ in range(rng.randint(1, 2)):
        match rng.randrange(7):
            case 0:
                header = replaced_somewhere(header, rng)
            case 1 | 2:
                header = _if_whole(header, with_edited_metadata, rng)
            case 3:
                header = _if_whole(header, with_renamed_tensor, rng)
            case 4:
                header = _if_whole(header, with_lying_shapes, rng)
            case _:
                body = with_poisoned_values(body, rng)
    text = json.dumps(header).encode()
    match rng.randrange(8):
        case 0:
            text = flipped(text, rng)
        case 1:
            body = flipped(body, rng)
        case 2:
            return flipped(packed(text, body), rng)
        case 3:
            whole = packed(text, body)
            return whole[: rng.randrange(len(whole))]
        case 4 if rng.random() < 0.5:
            lies = [0, 1, 640, len(text) - 1, len(text) + 1, 2**25, 2**40, 2**63, 2**64 - 1]
            return packed(text, body, rng.choice(lies))
    return packed(text, body)


def _if_whole(header: Any, edit: Callable[..., Any], rng: random.Random) -> Any:
    try:
        return edit(header, rng)
    except (TypeError, KeyError, AttributeError, IndexError, ValueError):
        return header  # an earlier edit left nothing to edit


def good_pickles() -> list[bytes]:
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)
        for name, (dtype, shape, data) in ORIGINALS[1][1].items()
        if dtype == "F32"
    }
    files = []
    for content in (tensors, {"state_dict": tensors, "epoch": 1}):
        for is_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
            files.append(buffer.getvalue())
    return files


def damaged_pickle(rng: random.Random) -> bytes:
    data = rng.choice(PICKLES)
    if data.startswith(b"PK") and rng.random() < 0.6:  # past the archive's own checks
        return _rezipped(data, rng)
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    start = 2000 if not data.startswith(b"PK") and rng.random() < 0.7 else len(data)
    return flipped(data[:start], rng) + data[start:]


def _rezipped(data: bytes, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl") and rng.random() < 0.7:
                content = _edited_program(content, rng)
            elif "/data/" in name and rng.random() < 0.3:
                content = with_poisoned_values(content, rng)
            elif rng.random() < 0.1:
                content = flipped(content, rng)
            if rng.random() > 0.02:
                new.writestr(name, content)
    return buffer.getvalue()


def _edited_program(program: bytes, rng: random.Random) -> bytes:
    """Instructions inserted, functions renamed, sizes made huge."""
    opcodes = (
        b"0123(.}])lbNRtQqrhjXKMJ\x85\x86\x87\x8a\x8b\x8c\x8d\x8e\x90\x91\x93\x94\x95\x96cioIL"
    )
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(program))
        match rng.randrange(5):
            case 0:
                program = program[:at] + bytes([rng.choice(opcodes)]) + program[at:]
            case 1:
                program = program[:at] + bytes([rng.choice(opcodes)]) + program[at + 1 :]
            case 2:
                old = rng.choice([b"FloatStorage", b"_rebuild_tensor_v2", b"OrderedDict", b"K\x08"])
                new = rng.choice([b"LongStorage", b"system", b"eval", b"\x8a\x06" + b"\x7f" * 6])
                program = program.replace(old, new, rng.randint(1, 3))
            case 3:
                program = program.replace(b"K\x08", b"J\xff\xff\xff\x7f", 1)
            case _:
                program = flipped(program, rng)
    return program


ORIGINALS = originals()
PICKLES = good_pickles()


# ---- what is asked of every file ----------------------------------------------------------------


def questions(path: Path) -> list[Callable[[AdapterHeader], object]]:
    return [
        lambda header: header.recipe(),
        lora_modules,
        check_dtypes,
        check_values,
        lambda header: check_coverage(header, BASE),
        lambda header: preflight(header, BASE),
        lambda _: _described(path),
    ]


def _described(path: Path) -> None:
    report = inspect_adapter(path, values=True)
    json.dumps(report.to_dict(), allow_nan=False)
    report.to_text().encode("utf-8")


def ask(path: Path, counts: Counter[str]) -> AdapterHeader | None:
    """All questions; only fewstep's own errors may come, in one short sentence."""
    try:
        header = open_adapter(path)
    except FewstepError as error:
        _check_sentence(error, path)
        counts["refused"] += 1
        return None
    counts["read"] += 1
    for question in questions(path):
        try:
            question(header)
        except FewstepError as error:
            _check_sentence(error, path)
            counts["unusable"] += 1
        else:
            counts["answered"] += 1
    return header


def _check_sentence(error: FewstepError, path: Path) -> None:
    text = str(error)
    assert isinstance(error, AdapterError | RecipeError), repr(error)
    assert text.startswith(f"{path}: "), text
    assert "\n" not in text, text
    assert "\x1b" not in text, text
    assert len(text) < 1000, text
    text.encode("utf-8")


@contextmanager
def counted_memory() -> Iterator[None]:
    """Inside, allocations are counted; at the end their peak must have been small."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


def peak_of_process() -> int:
    """Bytes of memory this process ever had; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(
    path: Path, make: Callable[[random.Random], bytes], seeds: range, agree: Callable[..., None]
) -> Counter[str]:
    """Counts of outcomes; no file may hang its reader."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        data = make(random.Random(seed))
        path.write_bytes(data)  # to a new file: to overwrite one is slow on some systems
        start = time.process_time()
        try:
            header = ask(path, counts)
            if header is not None:
                agree(header)
        except BaseException as error:
            error.add_note(f"seed {seed}: {data[:2000]!r}")
            raise
        path.unlink()
        assert time.process_time() - start < HANG_S, f"seed {seed} hangs its reader"
    return counts


def fuzz_all(
    path: Path, make: Callable[[random.Random], bytes], count: int, agree: Callable[..., None]
) -> Counter[str]:
    """`fuzz` over all seeds, memory watched."""
    before = peak_of_process()
    with counted_memory():
        counts = fuzz(path, make, range(NUM_TRACED), agree)
    counts += fuzz(path, make, range(NUM_TRACED, count), agree)
    assert peak_of_process() - before < GROWTH_BYTES
    assert counts["refused"] + counts["read"] == count
    return counts


def test_damaged_safetensors_files(tmp_path: Path) -> None:
    def agree(header: AdapterHeader) -> None:
        """safetensors' own reader opens what ours accepted and sees the same."""
        with safetensors.safe_open(header.path, framework="np") as file:
            assert set(file.keys()) == set(header.tensors)

    counts = fuzz_all(tmp_path / "a.safetensors", damaged_safetensors, NUM_SAFETENSORS, agree)
    for outcome in ("refused", "read", "unusable", "answered"):
        assert counts[outcome] > NUM_SAFETENSORS // 5, counts


def test_damaged_pickles(tmp_path: Path, own_assets: Path) -> None:
    """What opens has a whole copy: safetensors' own reader sees the same tensors in it."""

    def agree(header: AdapterHeader) -> None:
        written = safetensors.torch.load_file(header.tensor_file)
        shapes = {name: tuple(values.shape) for name, values in written.items()}
        assert shapes == {name: info.shape for name, info in header.tensors.items()}
        header.tensor_file.unlink()

    counts = fuzz_all(tmp_path / "a.pt", damaged_pickle, NUM_PICKLES, agree)
    assert counts["refused"] > NUM_PICKLES // 5, counts
    assert counts["read"] > NUM_PICKLES // 20, counts
    assert not list(own_assets.rglob("*.partial"))
