"""Exports and reference pictures for `make interop`.

    python -P tests/export/interop_reference.py OUT

writes OUT/<name>/ (an export of a tiny random pipeline) and OUT/<name>.npz (latents, prompt, the
pixels that fewstep's runtime draws from them), which tests/export/interop.py reads in Optimum's
environment.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fewstep.noise import NoiseBatch  # noqa: E402
from fewstep.recipe_plan import first_noise_scale, plan_steps  # noqa: E402
from fewstep.runtime.hosts.packing import pack  # noqa: E402
from tests.export.tiny_exports import BY_NAME, exported, runtime_of  # noqa: E402

NAMES = ("sd15", "sdxl", "sd3", "flux-schnell")
PROMPT, SEED = "a red cat", 7


def main(out: Path) -> None:
    """Write a folder and a reference per family."""
    out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(exported(name), out / name)
        export = BY_NAME[name]
        recipe = export.recipe()
        runtime = runtime_of(name, recipe)
        host = runtime._host
        shape = host.latent_shape(host.default_size)
        first = plan_steps(recipe)[0].level
        latents = NoiseBatch([SEED]).draw(shape) * first_noise_scale(recipe, first)
        given = {
            "latents": _as_packed(name, latents),
            "prompt": PROMPT,
            "steps": recipe.default_steps,
            "guidance_scale": 1.0 if export.is_vp else 0.0,
            "pixels": runtime(PROMPT, seed=SEED).pixels,
        }
        if export.text_length is not None:
            given["max_sequence_length"] = export.text_length
        np.savez(out / f"{name}.npz", **given)
        sys.stdout.write(f"{out / name}\n")


def _as_packed(name: str, latents: np.ndarray) -> np.ndarray:
    """FLUX takes latents as tokens."""
    return pack(latents) if name.startswith("flux") else latents


if __name__ == "__main__":
    main(Path(sys.argv[1]))
