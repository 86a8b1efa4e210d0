"""Pictures of the workflows in ComfyUI's real front end: for the docs, and as thumbnails.

python -m tests.comfy.screenshots COMFYUI_PATH /usr/bin/chromium
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tests.comfy.build_workflows import EXAMPLES, TWINS
from tests.comfy.front_end import FrontEnd, front_end
from tests.comfy.harness import ROOT, boot
from tests.comfy.server import Server, serving
from tests.comfy.twin_files import make_twin_files

IMAGES = ROOT / "docs" / "images"
SHOWN = {"01_few_step_quickstart": "comfy-quickstart", "06_wan22_high_low_experts": "comfy-experts"}
"""Workflow -> picture in docs/images."""
LISTS = {"CheckpointLoaderSimple": "checkpoints", "FewStepLoraLoader": "loras"}
"""Node -> the folder its first widget lists."""
WIDTH = 1500
SCALE = 1.4

THUMBNAIL = 400
CAPTION_TOP = 262
INK, FAINT, PAPER, ACCENT = "#f2f2f2", "#a8b5ae", "#171a18", "#2e7d5b"
CAPTIONS = {
    "01_few_step_quickstart": ("Quickstart", "adapter in, picture out"),
    "02_advanced_sockets": ("Sockets", "SAMPLER, SIGMAS, GUIDER of a recipe"),
    "03_style_lora_plus_few_step": ("Style LoRA", "together with a few-step one"),
    "04_img2img_and_inpaint": ("From a picture", "image to image, inpainting"),
    "05_two_phase_experts": ("Two experts", "they take turns on one base"),
    "06_wan22_high_low_experts": ("Wan 2.2", "high and low noise, four steps"),
    "07_existing_lora_with_preset": ("Presets", "for a LoRA you have already"),
    "08_stock_nodes_only": ("Stock nodes", "what a recipe saves you"),
    "09_right_and_wrong": ("Right and wrong", "one seed, three samplers"),
}


def main() -> None:
    """Start a server, open every workflow, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("chromium")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with _opened(given.comfyui.resolve(), given.chromium, Path(folder)) as (server, page):
            for name in CAPTIONS:
                picture = Path(folder) / f"{name}.png"
                _open(page, server, name)
                if name in SHOWN:
                    page.picture(picture, width=WIDTH)
                    _write_small(picture, IMAGES / f"{SHOWN[name]}.png")
                page.picture(picture, width=WIDTH, notes=False)
                _write_thumbnail(picture, name)


@contextmanager
def _opened(comfyui: Path, chromium: str, folder: Path) -> Iterator[tuple[Server, FrontEnd]]:
    with serving(comfyui, folder) as server:
        boot(comfyui, folder)  # whose classes make the tiny models
        make_twin_files(folder)
        for name in CAPTIONS:
            _stand_in(_workflow(name), folder)
        with front_end(server.url, chromium, width=WIDTH, scale=SCALE) as page:
            yield server, page


def _workflow(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


def _stand_in(workflow: Mapping[str, Any], folder: Path) -> None:
    """Empty files for the models, so that the lists of the nodes have them."""
    for node in workflow["nodes"]:
        if node["type"] in LISTS:
            (folder / LISTS[node["type"]] / node["widgets_values"][0]).touch()
        for model in node["properties"].get("models", ()):
            (folder / model["directory"] / model["name"]).touch()


def _open(page: FrontEnd, server: Server, name: str) -> None:
    if texts := page.load(_workflow(name), name):
        raise RuntimeError(f"{name} brings up a dialog: {texts}")
    if name in SHOWN and name != "01_few_step_quickstart":
        server.wait(page.run(_without_pictures(name)))


def _without_pictures(name: str) -> dict[str, Any]:
    """The twin up to its sampler: nodes say what they say of the real models, nothing is drawn."""
    graph = json.loads((TWINS / f"{name}.json").read_text(encoding="utf-8"))
    ends = ("VAEDecode", "CreateVideo", "SaveVideo", "SaveImage")
    kept = {key: node for key, node in graph.items() if node["class_type"] not in ends}
    sampler = next(k for k, node in kept.items() if node["class_type"] == "SamplerCustomAdvanced")
    end = {"class_type": "FewStepTestCapture", "inputs": {"value": [sampler, 0], "name": "end"}}
    return {**kept, "end": end}


def _write_small(picture: Path, target: Path) -> None:
    with Image.open(picture) as drawn:
        drawn.convert("RGB").save(target, optimize=True)


def _write_thumbnail(picture: Path, name: str) -> None:
    """The graph over a caption; a square, as the template browser has it."""
    card = Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER)
    with Image.open(picture) as drawn:
        graph = drawn.convert("RGB")
        graph.thumbnail((THUMBNAIL - 16, CAPTION_TOP - 40), Image.Resampling.LANCZOS)
    card.paste(graph, ((THUMBNAIL - graph.width) // 2, (CAPTION_TOP - graph.height) // 2))
    pen = ImageDraw.Draw(card)
    pen.rectangle((0, CAPTION_TOP, 8, THUMBNAIL), fill=ACCENT)
    title, line = CAPTIONS[name]
    pen.text((30, CAPTION_TOP + 18), title, INK, ImageFont.load_default(44))
    pen.text((30, CAPTION_TOP + 84), line, FAINT, ImageFont.load_default(20))
    card.save(EXAMPLES / f"{name}.jpg", quality=86, optimize=True, progressive=True)


if __name__ == "__main__":
    main()
