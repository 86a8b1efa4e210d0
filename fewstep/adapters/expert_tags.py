"""Which phase expert a file is: the two LoRA files of a Wan 2.2 pair have identical tensor names.

In this order, the first that says something wins: the file's own metadata (`fewstep.phase`), the
component its modules are for (Wan 2.2 in diffusers: `transformer_2` is the low-noise network), the
words of its name and of its folder's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.adapters.header import AdapterHeader
from fewstep.adapters.names import parse_name

PHASE_KEY = "fewstep.phase"
"""Metadata key: the name of the recipe's expert (`Expert.adapter`) that the file is."""
HIGH, LOW = "high_noise", "low_noise"
COMPONENT_EXPERTS = {"transformer_2": LOW}
_SURE = re.compile(r"(?<![a-z])(high|low)[-_. ]?noise(?![a-z])", re.IGNORECASE)
_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
_LETTER = re.compile(r"(?<![a-z0-9])([hl])(?![a-z0-9])", re.IGNORECASE)
_TWO_EXPERTS = re.compile(r"wan[-_. ]?2[-_. ]?2", re.IGNORECASE)
_OTHER_MEANINGS = (
    *("contrast", "cost", "def", "definition", "detail", "details", "end", "fantasy", "fidelity"),
    *("freq", "frequency", "grade", "heel", "heels", "key", "level", "light", "mem", "memory"),
    *("motion", "poly", "quality", "rank", "ram", "res", "resolution", "rise", "score", "speed"),
    *("step", "steps", "vram"),
)
"""What follows "high" and "low" where they are not about noise."""


@dataclass(frozen=True, slots=True)
class ExpertTag:
    """Which expert a file is.

    Attributes:
        name: "high_noise", "low_noise", or the name that the metadata gives.
        known_by: How it is known, in words that follow "known by".
    """

    name: str
    known_by: str


def expert_tag(header: AdapterHeader) -> ExpertTag | None:
    """Which expert the file says it is, by the most reliable place; None where none says."""
    tags = expert_tags(header)
    return tags[0] if tags else None


def expert_tags(header: AdapterHeader) -> tuple[ExpertTag, ...]:
    """What each of the three places says, the most reliable first; they should agree."""
    found = []
    phase = header.metadata.get(PHASE_KEY, "").strip()
    if phase:
        found.append(ExpertTag(phase, f"{PHASE_KEY!r} in the file's metadata"))
    denoisers = [name for name in components_of(header) if not name.startswith("text_encoder")]
    if len(denoisers) == 1 and denoisers[0] in COMPONENT_EXPERTS:
        known_by = f"its modules, which are for {denoisers[0]}"
        found.append(ExpertTag(COMPONENT_EXPERTS[denoisers[0]], known_by))
    for text, what in (
        (header.path.stem, "the file's name"),
        (header.path.parent.name, "its folder's name"),
    ):
        name = _name_hint(text)
        if name is not None:
            found.append(ExpertTag(name, what))
            break
    return tuple(found)


def expert_by_name(header: AdapterHeader, names: Sequence[str]) -> int | None:
    """Index of the recipe's expert that a file's own name is, else its tag; None where none tells.

    Args:
        header: The file's.
        names: Of the recipe's experts, noisiest first.
    """
    stem = header.path.stem.lower()
    whole = [index for index, name in enumerate(names) if name.lower() in stem]
    if len(whole) == 1:
        return whole[0]
    tag = expert_tag(header)
    if tag is None:
        return None
    if tag.name in names:
        return names.index(tag.name)
    if tag.name in (HIGH, LOW) and len(names) == 2:
        return (HIGH, LOW).index(tag.name)
    return None


def components_of(header: AdapterHeader) -> tuple[str, ...]:
    """Components that the tensors are for, sorted; "denoiser" for names that do not say which."""
    # What is before the first dot decides, and most files have few such beginnings.
    beginnings = {name.partition(".")[0]: name for name in header.tensors}
    return tuple(sorted({parse_name(name).component for name in beginnings.values()}))


def _name_hint(text: str) -> str | None:
    """high_noise or low_noise, where the words of a name say one of them and not both."""
    for pattern in (_SURE, _WORD, _LETTER):
        if pattern is _LETTER and not _TWO_EXPERTS.search(text):
            break  # a lone h or l means many things elsewhere
        words = {
            match[1][0].lower()
            for match in pattern.finditer(text)
            if pattern is not _WORD or not _means_something_else(text[match.end() :])
        }
        if words:
            return {"h": HIGH, "l": LOW}[words.pop()] if len(words) == 1 else None
    return None


def _means_something_else(rest: str) -> bool:
    following = re.match(r"[-_. ]?([a-z]+)", rest, re.IGNORECASE)
    return following is not None and following[1].lower() in _OTHER_MEANINGS
