"""Write the example workflows, their API twins and English words again, from the nodes as they are.

    COMFYUI_PATH=... python -m tests.comfy.build_workflows

Run it after a node's inputs or tooltips changed; tests fail until you did. Other languages and help
pages are written by hand.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.comfy.example_sheets import ALL_SHEETS
from tests.comfy.harness import PACK, boot
from tests.comfy.node_kinds import Kind, kinds_of
from tests.comfy.node_words import english
from tests.comfy.sheet_api import to_api
from tests.comfy.sheet_ui import to_ui
from tests.comfy.subgraph_sheet import NAME, few_step_t2i

EXAMPLES = PACK / "example_workflows"
SUBGRAPHS = PACK / "subgraphs"
ENGLISH = PACK / "locales" / "en" / "nodeDefs.json"
TWINS = Path(__file__).parent / "graphs"


def files(kinds: dict[str, Kind]) -> dict[Path, str]:
    """Every generated file and its text."""
    found: dict[Path, str] = {}
    for make in ALL_SHEETS:
        sheet = make()
        found[EXAMPLES / f"{sheet.name}.json"] = _text(to_ui(sheet, kinds))
        found[TWINS / f"{sheet.name}.json"] = _text(to_api(sheet, kinds))
    found[SUBGRAPHS / f"{NAME}.json"] = _text(few_step_t2i(kinds))
    return found


def _text(graph: dict[str, Any]) -> str:
    return json.dumps(graph, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Boot ComfyUI, ask it for its nodes, write."""
    with tempfile.TemporaryDirectory() as folder:
        comfy = boot(Path(os.environ["COMFYUI_PATH"]).resolve(), Path(folder))
        made = files(kinds_of(comfy.nodes())) | {ENGLISH: _text(english(comfy.nodes()))}
        for path, text in made.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
