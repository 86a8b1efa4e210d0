"""The zoo: recipes of public few-step models, one JSON file each, with where they come from."""

from fewstep.zoo.catalogue import UnknownEntryError, entries, entry, search_entries
from fewstep.zoo.entry import ZooEntry, ZooFile
from fewstep.zoo.likeness import likely_entries
from fewstep.zoo.matching import ZooMatch, match_adapter, match_base

__all__ = [
    "UnknownEntryError",
    "ZooEntry",
    "ZooFile",
    "ZooMatch",
    "entries",
    "entry",
    "likely_entries",
    "match_adapter",
    "match_base",
    "search_entries",
]
