"""`python -m fewstep.export feeds`: a prompt and a seed as a fused graph's inputs, in JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from fewstep.runtime.cache_folder import write_whole
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.fused_runtime import fused_feeds, fused_graph

HELP = """\
Write the inputs of a fused graph for a prompt and a seed as JSON: {name: {dims, data}}.

For hosts in other languages, and for tests of them: whoever feeds these numbers to the graph gets
fewstep's own picture (examples/node).

Example:
  fewstep export feeds exported/ --prompt "a handwritten seven" --seed 7 --out feeds.json"""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedsOptions:
    """Inputs of a fused graph as JSON."""

    folder: tyro.conf.Positional[Path]
    """Export folder with a fused graph."""
    prompt: str
    """What to draw."""
    seed: int = 0
    """Of the picture."""
    out: Path = Path("feeds.json")
    """File to write."""


def run(options: FeedsOptions, console: Console) -> None:
    """Write the file."""
    folder = ExportFolder.open(options.folder)
    feeds = fused_feeds(folder, fused_graph(folder), [options.prompt], [options.seed])
    found = {
        name: {"dims": list(value.shape), "data": value.ravel().tolist()}
        for name, value in feeds.items()
    }
    write_whole(options.out, json.dumps(found))
    console.print(f"wrote {options.out}", highlight=False)
