"""A ComfyUI server as users run it: a process of its own, spoken to over HTTP."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.comfy.harness import MODEL_FOLDERS, TESTKIT, GraphFailed
from tests.comfy.plain_python import plain_python

BOOT_S = 240.0
GRAPH_S = 120.0
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        url: Where it listens.
        folder: Models, input/ and output/, as of `harness.Comfy`.
        log: What it prints.
    """

    url: str
    folder: Path
    log: Path

    def get(self, path: str) -> Any:
        """An answer's JSON."""
        return json.loads(self._ask(path))

    def picture(self, entry: Mapping[str, str]) -> bytes:
        """The bytes of a picture that an output node tells of."""
        return self._ask(f"/view?{urllib.parse.urlencode(entry)}")

    def post(self, path: str, data: Mapping[str, Any]) -> Any:
        """Send JSON; the answer's, or None if it is empty."""
        said = self._ask(path, json.dumps(data).encode())
        return json.loads(said) if said else None

    def start(self, graph: Mapping[str, Any], workflow: Any = None) -> str:
        """Queue a graph.

        Args:
            graph: API format.
            workflow: The front end's, which pictures then carry.

        Returns:
            The prompt's id.

        Raises:
            GraphFailed: The graph is refused.
        """
        extra = {} if workflow is None else {"extra_pnginfo": {"workflow": workflow}}
        body = {"prompt": graph, "client_id": uuid.uuid4().hex, "extra_data": extra}
        try:
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise _refused(json.loads(error.read())) from error

    def wait(self, prompt_id: str) -> dict[str, Any]:
        """Until a graph is done.

        Returns:
            Its outputs by node id.

        Raises:
            GraphFailed: A node raised, or it was interrupted.
        """
        end = time.monotonic() + GRAPH_S
        while time.monotonic() < end:
            done = self.get(f"/history/{prompt_id}").get(prompt_id)
            if done is not None:
                _raise_failure(done["status"]["messages"])
                return done["outputs"]
            time.sleep(POLL_S)
        raise TimeoutError(f"the graph was not done after {GRAPH_S:.0f} s:\n{self.tail()}")

    def run(self, graph: Mapping[str, Any]) -> dict[str, Any]:
        """Queue a graph and wait for its outputs."""
        return self.wait(self.start(graph))

    def tail(self, lines: int = 40) -> str:
        """The end of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"} if body else {}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


@contextmanager
def serving(comfyui: Path, folder: Path) -> Iterator[Server]:
    """A server with the test kit and our pack, as `fewstep comfy install` puts it there.

    It runs in an environment without fewstep: the pack has the one it carries, and no other.

    Args:
        comfyui: A checkout of ComfyUI; nothing in it is changed.
        folder: Empty; becomes its base directory.
    """
    paths = _lay_out(folder)
    _install_pack(folder)
    port = _free_port()
    log = folder / "server.log"
    command = [
        *(str(plain_python(folder / "environment")), str(comfyui / "main.py"), "--cpu"),
        *("--listen", "127.0.0.1"),
        *("--port", str(port), "--base-directory", str(folder), "--disable-api-nodes"),
        *("--extra-model-paths-config", str(paths), "--database-url", "sqlite:///:memory:"),
        "--disable-auto-launch",
    ]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", folder, log)
            _wait_for(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _install_pack(folder: Path) -> None:
    command = (sys.executable, "-m", "fewstep", "comfy", "install", "--comfyui", str(folder))
    subprocess.run(command, check=True, cwd=folder, capture_output=True)


def _lay_out(folder: Path) -> Path:
    for name in (*MODEL_FOLDERS, *("models", "input", "output", "custom_nodes", "user")):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TESTKIT, folder / "custom_nodes" / TESTKIT.name, ignore=ignored)
    paths = folder / "extra_model_paths.yaml"
    lines = [f"  {name}: {name}\n" for name in MODEL_FOLDERS]
    text = f"fewstep_tests:\n  base_path: {folder}\n{''.join(lines)}"
    paths.write_text(text, encoding="utf-8")
    return paths


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(server: Server, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + BOOT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended while it started:\n{server.tail()}")
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(POLL_S)
    raise TimeoutError(f"ComfyUI did not answer within {BOOT_S:.0f} s:\n{server.tail()}")


def _refused(said: dict[str, Any]) -> GraphFailed:
    for node_id, found in (said.get("node_errors") or {}).items():
        first = found["errors"][0]
        return GraphFailed(node_id, f"{first['message']}: {first['details']}", first["type"])
    error = said["error"]
    return GraphFailed("", f"{error['message']} {error['details']}".strip(), error["type"])


def _raise_failure(messages: list[tuple[str, dict[str, Any]]]) -> None:
    for event, data in messages:
        if event == "execution_interrupted":
            raise GraphFailed(data["node_id"], "interrupted", "interrupted")
        if event == "execution_error":
            message, kind = data["exception_message"].strip(), data["exception_type"]
            raise GraphFailed(data["node_id"], message, kind, "".join(data["traceback"]))
