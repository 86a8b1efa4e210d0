"""Write an adapter file that every reader applies the same way.

Readers disagree about alpha: diffusers takes it from a LoraConfig in the metadata, kohya-style
tools from `.alpha` tensors (together with that LoraConfig diffusers refuses them), ComfyUI from
those tensors only, others ignore it. So the scale is multiplied into the up matrices and alpha
equals rank: a reader that knows alpha and one that does not both apply scale 1.

The bytes are laid out here, not by safetensors, whose metadata order changes from run to run:
equal input gives an equal file.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fewstep.adapters.modelspec import modelspec
from fewstep.adapters.modules import LORA_METADATA_KEY
from fewstep.adapters.names import parse_name, shown
from fewstep.errors import AdapterError, MissingExtraError
from fewstep.recipe import METADATA_KEY, FewStepRecipe, Lora

if TYPE_CHECKING:
    import torch

Component = Literal["transformer", "transformer_2", "unet"]
Dtype = Literal["fp32", "fp16", "bf16"]
DTYPE_NAMES: dict[Dtype, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
RESERVED = ("format", METADATA_KEY, LORA_METADATA_KEY)


def save_adapter(
    path: Path | str,
    tensors: Mapping[str, "torch.Tensor"],
    *,
    recipe: FewStepRecipe,
    rank: int,
    alpha: float,
    title: str,
    component: Component = "transformer",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dtype: Dtype = "fp32",
    description: str = "",
    resolution: tuple[int, int] | None = None,
    date: str | None = None,
    thumbnail_png: bytes | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a diffusers-loadable LoRA file with its recipe inside, or leave the old file as it was.

    Each module is meant as `weight + recipe.lora.scale * alpha / rank * lora_B @ lora_A`. The
    factor is multiplied into lora_B (in float32); the stored recipe says scale 1, alpha "baked".

    Args:
        path: Target, `*.safetensors`; its folder is made if needed.
        tensors: PEFT names without component, `<module>.lora_A.weight` (rank, in, ...) and
            `<module>.lora_B.weight` (out, rank, ...); any float dtype and device.
        recipe: How the adapter is sampled.
        rank: Rank of every module that `rank_pattern` does not name.
        alpha: Alpha of every module that `alpha_pattern` does not name.
        title: Name for people.
        component: The pipeline component the modules are in.
        rank_pattern: Full module name -> its rank.
        alpha_pattern: Full module name -> its alpha.
        dtype: Stored precision.
        description: A sentence or two for people.
        resolution: (width, height) in px of the training images.
        date: ISO 8601; None leaves it out, so that equal input gives equal bytes.
        thumbnail_png: A small picture, PNG bytes.
        metadata: More text for the file's metadata.

    Returns:
        The path written.

    Raises:
        AdapterError: Names, shapes, ranks or values do not make a LoRA, or a metadata key is taken.
        MissingExtraError: torch is not installed.
    """
    path = checked_target(path, component)
    ranks = lora_ranks(tensors, rank, rank_pattern or {}, alpha_pattern or {})
    alphas = {name: (alpha_pattern or {}).get(name, alpha) for name in ranks}
    factors = {name: recipe.lora.scale * alphas[name] / ranks[name] for name in ranks}
    data = {f"{component}.{n}": t for n, t in stored(tensors, factors, dtype).items()}
    digest = hashlib.sha256()
    for values in data.values():
        digest.update(_bytes(values))
    entries = {
        **checked_extra(metadata or {}),
        **modelspec(
            recipe,
            title=title,
            description=description,
            data_sha256=digest.hexdigest(),
            resolution=resolution,
            date=date,
            thumbnail_png=thumbnail_png,
        ),
        "format": "pt",
        METADATA_KEY: dataclasses.replace(recipe, lora=Lora(scale=1.0, alpha="baked")).to_json(),
        LORA_METADATA_KEY: _lora_config(ranks, rank, component),
    }
    header = _header(data, entries, DTYPE_NAMES[dtype])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (header, *(_bytes(values) for values in data.values())))
    return path


def checked_target(path: Path | str, component: str) -> Path:
    """The path of a file to be written.

    Raises:
        AdapterError: It is no .safetensors file, or the component is unknown.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path}: adapters are safetensors files; end the name in .safetensors")
    if component not in get_args(Component):
        raise AdapterError(f"component is {component!r}; use one of {get_args(Component)}")
    return path


def lora_ranks(
    tensors: Mapping[str, "torch.Tensor"],
    rank: int,
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> dict[str, int]:
    """Module -> rank, checked against the tensors; modules in sorted order.

    Raises:
        AdapterError: Names or shapes do not make LoRA pairs of these ranks.
    """
    modules = sorted({_module(name) for name in tensors})
    if not modules:
        raise AdapterError("an adapter needs at least one module; got no tensors")
    unknown = sorted({*rank_pattern, *alpha_pattern} - set(modules))
    if unknown:
        raise AdapterError(f"a pattern names {unknown[0]!r}, which is not a module of the adapter")
    ranks = {}
    for module in modules:
        down, up = tensors.get(module + DOWN), tensors.get(module + UP)
        if down is None or up is None:
            raise AdapterError(f"{module} has no {DOWN if down is None else UP}; give both")
        wanted = rank_pattern.get(module, rank)
        if down.ndim < 2 or up.ndim < 2 or not down.shape[0] == up.shape[1] == wanted >= 1:
            raise AdapterError(
                f"{module} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, wanted "
                f"({wanted}, in) and (out, {wanted}); set rank or rank_pattern to the real rank"
            )
        ranks[module] = wanted
    return ranks


def _module(name: str) -> str:
    module = name.removesuffix(DOWN).removesuffix(UP)
    if module == name or not module:
        raise AdapterError(f"{shown(name)} does not end in {DOWN} or {UP}; use PEFT names")
    if parse_name(name).dialect != "bare":
        raise AdapterError(f"{shown(name)} has a prefix; give module names as in the denoiser")
    return module


def stored(
    tensors: Mapping[str, "torch.Tensor"], factors: Mapping[str, float], dtype: Dtype
) -> dict[str, "torch.Tensor"]:
    """Tensors as stored: on the CPU, contiguous, cast, sorted by name.

    Args:
        tensors: Name -> values, any float dtype and device.
        factors: Module -> what its up matrix is multiplied with, in float32.
        dtype: Stored precision.

    Raises:
        AdapterError: A value is not finite in that precision.
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch") from error
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    data = {}
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32)
        if name.endswith(UP):
            values = values * factors[name.removesuffix(UP)]
        values = values.to(kind).contiguous()
        if not bool(values.isfinite().all()):
            raise AdapterError(
                f"{name} has values that are not finite in {dtype}; the training diverged, or the "
                "weights need fp32 or bf16"
            )
        data[name] = values
    return data


def _bytes(values: "torch.Tensor") -> memoryview:
    import torch

    return values.view(torch.uint8).numpy().data


def _lora_config(ranks: Mapping[str, int], rank: int, component: str) -> str:
    """The least that diffusers and every peft from 0.17 on need to build its LoraConfig."""
    config: dict[str, object] = {"r": rank, "lora_alpha": rank, "target_modules": list(ranks)}
    # "^" binds a pattern to the whole name; without it "proj_out" also means "blocks.0.proj_out".
    pattern = {f"^{module}": r for module, r in ranks.items() if r != rank}
    if pattern:
        config["rank_pattern"] = config["alpha_pattern"] = pattern
    prefixed = {f"{component}.{key}": value for key, value in config.items()}
    return json.dumps(prefixed, sort_keys=True)


def checked_extra(metadata: Mapping[str, str]) -> dict[str, str]:
    """More metadata of the caller's.

    Raises:
        AdapterError: A key is ours, or a value is no text.
    """
    for key, value in metadata.items():
        if key in RESERVED or key.startswith("modelspec."):
            raise AdapterError(f"metadata key {key!r} is written by fewstep; choose another name")
        if not isinstance(value, str):
            raise AdapterError(f"metadata {key!r} must be text, got {type(value).__name__}")
    return dict(metadata)


def _header(
    data: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str], dtype_name: str
) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, values in data.items():
        end = position + values.numel() * values.element_size()
        content[name] = {
            "dtype": dtype_name,
            "shape": list(values.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # readers map the data in place: keep it aligned
    return len(text).to_bytes(8, "little") + text


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
