"""Which sizes an engine is built for: one range per symbol of a graph."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import ExportError
from fewstep.recipe import SIDECAR_NAME, FewStepRecipe
from fewstep.runtime.hosts import flux, stable_diffusion_3
from fewstep.runtime.manifest import Graph, Manifest

CLIP_LENGTH = 77
T5_LENGTHS = {"sd3": stable_diffusion_3.T5_LENGTH, "flux": flux.T5_LENGTH}
"""Families whose prompts are read by CLIP and by T5, each at a length of its own."""


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Smallest, usual and largest value of a symbol."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ExportError(
                f"a range is {self}, wanted MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, such as 1:1:4"
            )

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True, slots=True)
class PictureSize:
    """Width and height in pixels."""

    width: int
    height: int


def parse_range(text: str) -> SizeRange:
    """Read "1:1:4", or "2" for a fixed size.

    Raises:
        ExportError: It is neither.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() for part in parts):
        raise ExportError(f"a range is {text!r}, wanted MIN:OPT:MAX or one number, such as 1:1:4")
    numbers = [int(part) for part in parts]
    return SizeRange(*numbers) if len(numbers) == 3 else SizeRange(*numbers * 3)


def parse_named_range(text: str) -> tuple[str, SizeRange]:
    """Read "sequence_length=77:77:256".

    Raises:
        ExportError: There is no name or no range.
    """
    name, _, value = text.partition("=")
    if not name or not value:
        raise ExportError(
            f"--range is {text!r}, wanted SYMBOL=MIN:OPT:MAX, such as sequence_length=77:77:256"
        )
    return name, parse_range(value)


def symbol_ranges(
    manifest: Manifest,
    component: str,
    *,
    sizes: tuple[PictureSize, ...],
    batch: SizeRange,
    prompt: SizeRange = SizeRange(CLIP_LENGTH, CLIP_LENGTH, CLIP_LENGTH),
    stated: Mapping[str, SizeRange],
) -> dict[str, SizeRange]:
    """A range for every symbol of a component's graph, as narrow as the request allows.

    Args:
        manifest: Of the folder.
        component: A key of its graphs.
        sizes: Pictures the engine must draw; the first is what kernels are chosen for.
        batch: Pictures at once.
        prompt: Tokens of a prompt, from `prompt_range`.
        stated: Symbol, or "component.symbol", -> range; wins over what would be derived.

    Returns:
        Symbol -> range, all divisible by the graph's multiples.

    Raises:
        ExportError: A symbol has no derivation and no stated range, or a size is not divisible.
    """
    graph = manifest.graphs[component]
    derived = _derived(manifest, sizes, prompt) | {"batch_size": batch}
    ranges = {}
    for symbol in graph.symbols:
        found = stated.get(f"{component}.{symbol}") or stated.get(symbol) or derived.get(symbol)
        if found is None:
            raise ExportError(
                f"{component} has size {symbol}, which is not derived from --size; give it: "
                f"--range {symbol}=MIN:OPT:MAX"
            )
        _check_multiple(graph, component, symbol, found)
        ranges[symbol] = found
    return ranges


def text_length(folder: Path, manifest: Manifest) -> int:
    """Tokens of a prompt: what the host pads to, else the places of the first text encoder."""
    stated = manifest.settings.get("tokenizer_max_length")
    config = folder / "text_encoder" / "config.json"
    if stated is not None or not config.is_file():
        return int(stated or CLIP_LENGTH)
    places = json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings")
    return int(places or CLIP_LENGTH)


def prompt_range(folder: Path, manifest: Manifest, component: str) -> SizeRange:
    """Tokens that the runtime feeds a component.

    Args:
        folder: Of the export.
        manifest: Of the folder.
        component: A key of its graphs.
    """
    text = text_length(folder, manifest)
    if manifest.family not in T5_LENGTHS:
        return SizeRange(text, text, text + int(manifest.settings.get("max_sequence_length", 0)))
    file = folder / SIDECAR_NAME
    stated = FewStepRecipe.from_file(file).base.max_sequence_length if file.is_file() else None
    long = stated or T5_LENGTHS[manifest.family]
    fed = {
        "sd3": {"text_encoder_3": long, "transformer": text + long},
        "flux": {"text_encoder_2": long, "transformer": long},
    }
    length = fed[manifest.family].get(component, text)
    return SizeRange(length, length, length)


def _derived(
    manifest: Manifest, sizes: tuple[PictureSize, ...], prompt: SizeRange
) -> dict[str, SizeRange]:
    factor = int(manifest.settings.get("vae_scale_factor", 8))
    widths, heights = [s.width for s in sizes], [s.height for s in sizes]
    for pixels in (*widths, *heights):
        if pixels % factor:
            raise ExportError(
                f"--size has {pixels} pixels, wanted a multiple of {factor}; the nearest is "
                f"{max(1, round(pixels / factor)) * factor}"
            )
    latent_heights, latent_widths = [h // factor for h in heights], [w // factor for w in widths]
    packed = [(h // 2) * (w // 2) for h, w in zip(latent_heights, latent_widths, strict=True)]
    return {
        "height": _span(latent_heights),
        "width": _span(latent_widths),
        "latent_height": _span(latent_heights),
        "latent_width": _span(latent_widths),
        "sample_height": _span(heights),
        "sample_width": _span(widths),
        "packed_height_width": _span(packed),
        "sequence_length": prompt,
        "step": SizeRange(1, 1, 1),
    }


def _span(values: list[int]) -> SizeRange:
    return SizeRange(min(values), values[0], max(values))


def _check_multiple(graph: Graph, component: str, symbol: str, found: SizeRange) -> None:
    multiple = graph.multiples.get(symbol, 1)
    for value in (found.min, found.opt, found.max):
        if value % multiple:
            raise ExportError(
                f"{symbol} of {component} is {value}, wanted a multiple of {multiple}; the next is "
                f"{-(-value // multiple) * multiple}"
            )
