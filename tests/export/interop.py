"""`make interop`: Optimum loads an export folder and draws the pipeline's picture.

Optimum's pipelines need an older transformers, so this runs in an environment of its own:

    python -P tests/export/interop.py FOLDER REFERENCE.npz    (-P: tests/export/ has a triton too)

FOLDER is an export; REFERENCE.npz holds `latents`, `prompt` and the `pixels` that fewstep draws.
Binding is off: with it Optimum 2.3 (optimum-onnx 0.1) writes the network's output over its input
where there is no guidance; that it still does is checked too, so that the advice in docs/export.md
goes when the fault does.
"""

import sys
from pathlib import Path

import numpy as np
import optimum.onnxruntime  # pyright: ignore[reportMissingImports]
import torch

SAME = 1
"""Of 255."""


def draw(folder: Path, given: dict[str, np.ndarray], *, binding: bool) -> np.ndarray:
    """The picture Optimum draws from the same latents with the folder's stock scheduler."""
    loader = optimum.onnxruntime.ORTDiffusionPipeline
    pipe = loader.from_pretrained(folder, export=False, use_io_binding=binding)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": str(given["prompt"]),
        "num_inference_steps": int(given["steps"]),
        "guidance_scale": float(given["guidance_scale"]),
        "latents": torch.from_numpy(given["latents"]),
        "output_type": "np",
    }
    if "max_sequence_length" in given:
        arguments["max_sequence_length"] = int(given["max_sequence_length"])
    images = pipe(**arguments).images
    return np.round(images * 255.0).astype(np.uint8)


def main(folder: Path, reference: Path) -> int:
    """Compare and say so; returns the exit status."""
    given = dict(np.load(reference))
    wanted = given["pixels"].astype(int)
    without = int(np.abs(draw(folder, given, binding=False) - wanted).max())
    sys.stdout.write(f"Optimum without binding: {without} of 255\n")
    bound = int(np.abs(draw(folder, given, binding=True) - wanted).max())
    sys.stdout.write(f"Optimum with binding: {bound} of 255\n")
    return 0 if without <= SAME else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
