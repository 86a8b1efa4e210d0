"""ComfyUI's real front end in a headless Chromium."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_MS = 120_000
QUIET_MS = 1_500
"""How long drawing takes to settle."""

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.35.9",
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.Workflow.WorkflowTabsPosition": "Sidebar",
}
"""No tour, no overlays, names are drawn at every zoom, and nodes on the canvas."""
VUE_NODES = {**SETTINGS, "Comfy.VueNodes.Enabled": True}
"""Nodes as HTML over the canvas: "Nodes 2.0", which users can switch on."""

LOAD = """async ([workflow, name]) => {
  await app.loadGraphData(workflow, true, true, name, {showMissingModelsDialog: false});
}"""
BOUNDS = """(all) => {
  const groups = app.graph._groups.filter((one) => all || one.title !== "Read me");
  const boxes = groups.map((one) => one.boundingRect);
  const left = Math.min(...boxes.map((box) => box[0]));
  const top = Math.min(...boxes.map((box) => box[1]));
  const right = Math.max(...boxes.map((box) => box[0] + box[2]));
  const bottom = Math.max(...boxes.map((box) => box[1] + box[3]));
  return [left - 15, top - 15, right - left + 30, bottom - top + 30];
}"""
SHOW = """([left, top, width]) => {
  const view = app.canvas.ds;
  view.scale = app.canvasEl.getBoundingClientRect().width / width;
  view.offset[0] = -left;
  view.offset[1] = -top;
  app.canvas.setDirty(true, true);
}"""
BARE = """() => {
  document.querySelectorAll(".z-999").forEach((one) => { one.style.visibility = "hidden"; });
}"""
RUN = """async (graph) => {
  const sent = await app.api.queuePrompt(0, {output: graph, workflow: app.graph.serialize()});
  return sent.prompt_id;
}"""
SEEN = """() => app.graph._nodes.map((node) => ({
  id: node.id,
  type: node.type,
  size: [...node.size],
  least: [...node.computeSize()],
  known: node.type in LiteGraph.registered_node_types,
}))"""
DRAWN = """() => [...document.querySelectorAll("[data-node-id]")].map((one) => ({
  id: one.dataset.nodeId,
  box: one.getBoundingClientRect().toJSON(),
  text: one.innerText,
}))"""
DIALOGS = "[...document.querySelectorAll('[role=dialog]')].map((one) => one.innerText)"


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """An open front end.

    Attributes:
        page: Playwright's.
    """

    page: Any

    def load(self, workflow: dict[str, Any], name: str = "workflow") -> list[str]:
        """Open a workflow.

        Returns:
            The texts of the dialogs this brought up; missing models are not asked about.
        """
        self.page.evaluate(LOAD, [workflow, name])
        self.page.wait_for_timeout(QUIET_MS)
        return self.page.evaluate(DIALOGS)

    def nodes(self) -> list[dict[str, Any]]:
        """Of the open workflow: "id", "type", "size", "least" size, and whether it is "known"."""
        return self.page.evaluate(SEEN)

    def drawn(self) -> dict[int, dict[str, Any]]:
        """Vue nodes of the open workflow by id: the "box" on the screen, the "text" in it."""
        return {int(one["id"]): one for one in self.page.evaluate(DRAWN)}

    def graph(self) -> dict[str, Any]:
        """What Run would send: the open workflow in API format."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def saved(self) -> dict[str, Any]:
        """What Save would write."""
        return self.page.evaluate("app.graph.serialize()")

    def run(self, graph: dict[str, Any]) -> str:
        """Run another graph as if it were the open one: nodes of the same ids show what it says.

        Returns:
            The prompt's id.
        """
        return self.page.evaluate(RUN, graph)

    def picture(self, path: Path, *, width: int, notes: bool = True) -> None:
        """Draw the whole workflow, without the panels around it.

        Args:
            path: A PNG file.
            width: Of the window, in CSS pixels; the height follows.
            notes: With the column of the note.
        """
        box = self.page.evaluate(BOUNDS, notes)
        self.page.set_viewport_size({"width": width, "height": round(width * box[3] / box[2])})
        self.page.evaluate(BARE)
        self.page.wait_for_timeout(QUIET_MS)
        self.page.evaluate(SHOW, box[:3])
        self.page.wait_for_timeout(QUIET_MS)
        self.page.screenshot(path=path)


@contextmanager
def front_end(
    url: str,
    chromium: str,
    *,
    settings: Mapping[str, Any] = SETTINGS,
    width: int = 1600,
    height: int = 900,
    scale: float = 1.0,
) -> Iterator[FrontEnd]:
    """Open the front end of a running server.

    Args:
        url: The server's.
        chromium: Path of the browser.
        settings: The user's; the server keeps them.
        width: Of the window, in CSS pixels.
        height: The same.
        scale: Device pixels per CSS pixel.
    """
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(
                viewport={"width": width, "height": height}, device_scale_factor=scale
            )
            page.request.post(f"{url}/api/settings", data=dict(settings))
            page.goto(url, wait_until="domcontentloaded", timeout=READY_MS)
            page.wait_for_function("window.app?.vueAppReady && window.app.graph", timeout=READY_MS)
            page.wait_for_timeout(QUIET_MS)
            page.keyboard.press("Escape")
            yield FrontEnd(page)
        finally:
            browser.close()
