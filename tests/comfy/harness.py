"""ComfyUI inside this process: boot it once, then run graphs in well under a second each.

Nothing here imports ComfyUI before `boot`; after it, ComfyUI's modules (`comfy`, `nodes`,
`folder_paths`, ...) can be imported anywhere.
"""

import asyncio
import logging
import sys
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfy_nodes"
TESTKIT = Path(__file__).parent / "testkit"

MODEL_FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae", "vae_approx")

CORE_NODES = (
    "nodes_custom_sampler",
    "nodes_model_advanced",
    "nodes_model_merging",
    "nodes_sd3",
    "nodes_latent",
    "nodes_mask",
    "nodes_hunyuan",
    "nodes_wan",
    "nodes_pixart",
    "nodes_lt",
    "nodes_hooks",
    "nodes_cond",
    "nodes_preview_any",
    "nodes_primitive",
    "nodes_logic",
    "nodes_images",
    "nodes_differential_diffusion",
    "nodes_video",
)
"""Files of comfy_extras/ that the graphs of our tests use; all of them would take long to load."""


CACHE_ARGS = {"ram": 1.0, "ram_inactive": 1.0, "lru": 0}
"""What main.py gives the executor: GiB to keep free, which nothing here comes near; each release
reads the keys it knows."""


class GraphFailed(Exception):
    """A graph did not run to its end.

    Attributes:
        node_id: The node that failed; "" where the whole graph was refused.
        message: What a user would read on the node.
        kind: "interrupted", the exception's class, or the kind of validation error.
        traceback: The lines ComfyUI keeps of it.
    """

    def __init__(self, node_id: str, message: str, kind: str = "", traceback: str = "") -> None:
        super().__init__(f"node {node_id or '?'}: {message}\n{traceback}".rstrip())
        self.node_id = node_id
        self.message = message
        self.kind = kind
        self.traceback = traceback


class NoServer:
    """What ComfyUI's executor wants of its server: somebody to tell, who does not listen."""

    client_id: str | None = None
    last_node_id: str | None = None
    last_prompt_id: str | None = None

    def __init__(self) -> None:
        self.sockets_metadata: dict[str, Any] = {}

    def send_sync(self, event: Any, data: Any, sid: Any = None) -> None:
        """Nobody is connected."""


@dataclass(slots=True)
class Comfy:
    """A booted ComfyUI.

    Attributes:
        folder: Models (diffusion_models/, loras/, vae_approx/, ...), input/ and output/.
        progress: (done, all) of every progress report of the last graph.
        ui: What output nodes of the last graph showed, by node id.
        interrupt_at: Interrupt the next graph at this progress value, as its Cancel button would.
    """

    folder: Path
    progress: list[tuple[int, int]] = field(default_factory=list)
    ui: dict[str, Any] = field(default_factory=dict)
    interrupt_at: int | None = None

    def run(self, graph: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph in API format, nothing cached from earlier ones.

        Widgets that are left out have their defaults, as on a node that was just dropped in.

        Returns:
            What its FewStepTestCapture nodes caught, by name.

        Raises:
            GraphFailed: A node raised, ComfyUI refused the graph, or it was interrupted.
        """
        import execution  # pyright: ignore[reportMissingImports]

        prompt = {str(key): self._with_defaults(node) for key, node in graph.items()}
        kit = testkit()
        kit.CAUGHT.clear()
        kit.SEEN.clear()
        self.progress.clear()
        executor = execution.PromptExecutor(
            NoServer(), cache_type=execution.CacheType.CLASSIC, cache_args=CACHE_ARGS
        )
        key = uuid.uuid4().hex
        accepted, error, outputs, node_errors = asyncio.run(
            execution.validate_prompt(key, prompt, None)
        )
        if not accepted or node_errors:
            raise _refused(error, node_errors)
        executor.execute(prompt, key, {}, outputs)
        self.interrupt_at = None
        _raise_failure(executor.status_messages)
        self.ui = executor.history_result["outputs"]
        return dict(kit.CAUGHT)

    def _with_defaults(self, node: Mapping[str, Any]) -> dict[str, Any]:
        kind = self.nodes().get(node["class_type"])
        required = kind.INPUT_TYPES().get("required", {}) if kind else {}
        defaults = {name: _default(*told) for name, told in required.items()}
        known = {name: value for name, value in defaults.items() if value is not None}
        return {**node, "inputs": {**known, **node["inputs"]}}

    def seen(self, name: str = "network") -> list[dict[str, Any]]:
        """Network calls of the last graph under a FewStepTestSpy: timestep and sample each."""
        return testkit().SEEN.get(name, [])

    def nodes(self) -> dict[str, Any]:
        """Every loaded node class, by id."""
        import nodes  # pyright: ignore[reportMissingImports]

        return nodes.NODE_CLASS_MAPPINGS

    def reported(self, value: int, total: int) -> None:
        """A node tells how far it is."""
        import comfy.model_management as management  # pyright: ignore[reportMissingImports]

        self.progress.append((value, total))
        if self.interrupt_at is not None and value >= self.interrupt_at:
            management.interrupt_current_processing(True)
        management.throw_exception_if_processing_interrupted()


def _default(kind: Any, options: Mapping[str, Any] | None = None, *_: Any) -> Any:
    """What a widget holds before anybody touches it; None where there is no widget."""
    given = options or {}
    choices = kind if isinstance(kind, list) else given.get("options")
    if "default" in given:
        return given["default"]
    return choices[0] if choices else None


def testkit() -> Any:
    """The test kit as ComfyUI loaded it (not the module tests import)."""
    return sys.modules[str(TESTKIT).replace(".", "_x_")]


def boot(comfyui: Path, folder: Path) -> Comfy:
    """Import ComfyUI for the CPU, with its models, input and output in a folder, and our pack.

    Args:
        comfyui: A checkout of ComfyUI; nothing in it is changed.
        folder: Empty; gets sub-folders.
    """
    sys.path.insert(0, str(comfyui))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, not ours
        _configure(folder)
        comfy = Comfy(folder)
        asyncio.run(_load_nodes(comfyui))
        _report_progress_to(comfy)
    return comfy


def _configure(folder: Path) -> None:
    from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

    args.cpu = True
    args.base_directory = str(folder)
    args.disable_api_nodes = True
    args.database_url = "sqlite:///:memory:"
    import folder_paths  # pyright: ignore[reportMissingImports]
    import utils.extra_config  # noqa: F401  # pyright: ignore  # before nodes.py hides it

    for name in MODEL_FOLDERS:
        (folder / name).mkdir(exist_ok=True)
        folder_paths.add_model_folder_path(name, str(folder / name), is_default=True)
    for name in ("input", "output", "temp"):
        (folder / name).mkdir(exist_ok=True)


async def _load_nodes(comfyui: Path) -> None:
    import nodes  # pyright: ignore[reportMissingImports]

    await nodes.init_public_apis()
    for name in CORE_NODES:
        await _load(comfyui / "comfy_extras" / f"{name}.py", "comfy_extras")
    await _load(TESTKIT, "custom_nodes")
    await _load(PACK, "custom_nodes")


async def _load(path: Path, parent: str) -> None:
    import nodes  # pyright: ignore[reportMissingImports]

    said = _Said()
    logging.getLogger().addHandler(said)
    try:
        if not await nodes.load_custom_node(str(path), module_parent=parent):
            raise RuntimeError(f"ComfyUI could not load {path}:\n" + "\n".join(said.lines))
    finally:
        logging.getLogger().removeHandler(said)


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _report_progress_to(booted: Comfy) -> None:
    import comfy.utils as told  # pyright: ignore[reportMissingImports]

    def hook(value: int, total: int, preview: Any, prompt_id: Any = None, node_id: Any = None):
        booted.reported(value, total)

    told.set_progress_bar_global_hook(hook)
    told.set_progress_bar_enabled(False)  # of the console
    for name in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        if hasattr(told, name):  # steps of our tests are quicker than a person could see
            setattr(told, name, 0.0)


def _refused(error: dict[str, Any] | None, node_errors: dict[str, Any]) -> GraphFailed:
    for node_id, found in node_errors.items():
        first = found["errors"][0]
        text = f"{first['message']}: {first['details']}"
        return GraphFailed(str(node_id), text, first["type"])
    assert error is not None
    return GraphFailed("", f"{error['message']} {error['details']}".strip(), error["type"])


def _raise_failure(messages: list[tuple[str, dict[str, Any]]]) -> None:
    for event, data in messages:
        if event == "execution_interrupted":
            raise GraphFailed(data["node_id"], "interrupted", "interrupted")
        if event == "execution_error":
            raise GraphFailed(
                data["node_id"],
                data["exception_message"].strip(),
                data["exception_type"],
                "".join(data["traceback"]),
            )
