"""A copy of an adapter file that carries a recipe: the same tensors, byte for byte. No torch.

Only the header is written anew, so this takes files of any naming and size in constant memory.
`fewstep convert --recipe` is for a file whose names or alphas must change too.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fewstep.adapters.expert_tags import PHASE_KEY, expert_tag
from fewstep.adapters.families import KNOWN, guess_family
from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.kinds import adapter_parts
from fewstep.adapters.modelspec import usage_hint
from fewstep.adapters.modules import LoraModule
from fewstep.adapters.opening import open_adapter
from fewstep.adapters.preflight import may_be_of
from fewstep.adapters.writer import write_atomically
from fewstep.errors import AdapterError
from fewstep.recipe import METADATA_KEY, FewStepRecipe

CHUNK_BYTES = 8 * 1024 * 1024
HINT_KEY = "modelspec.usage_hint"
STALE = "sshs_legacy_hash"
"""kohya's hash of a part of the whole file, header included; its newer one is of tensors alone."""


def copy_with_recipe(
    source: Path | str, target: Path | str, recipe: FewStepRecipe, *, overwrite: bool = False
) -> bool:
    """Write a copy of an adapter with a recipe in its metadata; the whole copy or nothing.

    Args:
        source: The adapter (.safetensors, or a pickle of plain tensors); never changed.
        target: The new `*.safetensors`.
        recipe: Put in place of what the file carries, if anything.
        overwrite: Replace another file of that name.

    Returns:
        Whether anything was written; not where the very same copy is there already.

    Raises:
        AdapterError: The recipe is for another family, the target is no name for it or taken, or
            a file cannot be read or written.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise AdapterError(
            f"{target}: adapters are safetensors files; end the name in .safetensors"
        )
    header = open_adapter(source)
    if target.exists() and target.samefile(source):
        raise AdapterError(f"{target}: would overwrite the adapter it is made from; name another")
    modules = adapter_parts(header).modules()
    if not modules:
        raise AdapterError(f"{source}: holds no adapter to carry a recipe; give a LoRA file")
    _check_family(header, modules, recipe)
    start = _new_header(header, _metadata(header, modules, recipe))
    try:
        if target.exists():
            if _is_same(target, start, header):
                return False
            if not overwrite:
                raise AdapterError(
                    f"{target}: is there already, with other content; name another, or allow it to "
                    "be overwritten"
                )
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, _content(start, header))
    except OSError as error:
        raise AdapterError(
            f"{target}: cannot be written ({error.strerror or error}); give a folder you can write "
            "to"
        ) from error
    return True


def _check_family(
    header: AdapterHeader, modules: Sequence[LoraModule], recipe: FewStepRecipe
) -> None:
    guess, family = guess_family(modules), recipe.base.family
    if guess and family in KNOWN and not may_be_of(guess, family):
        raise AdapterError(
            f"{header.path}: its layers look like {guess}, but the recipe is for {family}; choose "
            "a recipe for this adapter"
        )


def _metadata(
    header: AdapterHeader, modules: Sequence[LoraModule], recipe: FewStepRecipe
) -> dict[str, str]:
    if recipe.lora.alpha == "baked" and any(m.alpha not in (None, m.rank) for m in modules):
        recipe = replace(recipe, lora=replace(recipe.lora, alpha="in_file"))
    metadata = {
        **header.metadata,
        METADATA_KEY: recipe.to_json(),
        HINT_KEY: f"{usage_hint(recipe)}; see {METADATA_KEY}",
    }
    metadata.setdefault("format", "pt")
    metadata.pop(STALE, None)
    tag = expert_tag(header)  # may be known by the file name alone, and the copy has another
    if tag is not None and tag.name in {expert.adapter for expert in recipe.experts}:
        metadata[PHASE_KEY] = tag.name
    return metadata


def _new_header(header: AdapterHeader, metadata: dict[str, str]) -> bytes:
    begin = _first_byte(header)
    content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, info in header.tensors.items():
        offset = info.offset - begin
        content[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # readers map the data in place: keep it aligned
    return len(text).to_bytes(8, "little") + text


def _first_byte(header: AdapterHeader) -> int:
    return min(info.offset for info in header.tensors.values())


def _content(start: bytes, header: AdapterHeader) -> Iterator[bytes]:
    """The new file in pieces; all of the old one's data is tensors (`read_header` checks)."""
    yield start
    with header.tensor_file.open("rb") as file:
        file.seek(_first_byte(header))
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _is_same(target: Path, start: bytes, header: AdapterHeader) -> bool:
    size = sum(info.num_bytes for info in header.tensors.values()) + len(start)
    if not target.is_file() or target.stat().st_size != size:
        return False
    with target.open("rb") as file:
        return all(file.read(len(piece)) == piece for piece in _content(start, header))
