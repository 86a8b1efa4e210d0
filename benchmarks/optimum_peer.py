"""Optimum's pipeline on an exported folder, in an environment of its own, drawing on demand.

optimum-onnx needs older transformers than diffusers does here, so it cannot share the process; it
shares the rounds instead: one line asks for a picture, one line says that it is there.
"""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch
from optimum.onnxruntime import ORTDiffusionPipeline
folder, prompt, scale, threads = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
pipe = ORTDiffusionPipeline.from_pretrained(folder, export=False, use_io_binding=False)
pipe.set_progress_bar_config(disable=True)
for _ in sys.stdin:
    pipe(prompt, num_inference_steps=4, guidance_scale=scale)
    print("drawn", flush=True)
"""


class OptimumPeer:
    """A process that draws a picture when called.

    Args:
        python: Interpreter of an environment with optimum-onnx.
        folder: Export folder.
        prompt: Drawn every time.
        threads: For torch; ONNX Runtime takes the cores it finds, as Optimum leaves it.
    """

    def __init__(self, python: str, folder: Path, prompt: str, threads: int) -> None:
        scale = "0.0" if (folder / "transformer").exists() else "1.0"
        self._process = subprocess.Popen(
            [python, "-c", PROGRAM, str(folder), prompt, scale, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> None:
        """Draw one picture."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("draw\n")
        self._process.stdin.flush()
        while (line := self._process.stdout.readline()) != "drawn\n":
            if not line:
                sys.exit("Optimum failed; what it said stands above")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
