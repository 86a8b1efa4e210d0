"""What the nodes cost in ComfyUI: start-up of the pack, and a step of our sampler beside core's.

    COMFYUI_PATH=path/of/ComfyUI python benchmarks/comfyui_nodes.py

Start-up: ComfyUI is imported in a fresh process, then the pack is loaded as ComfyUI loads it, timed
alone. Steps: the same GUIDER, noise and sigmas through core's euler and through the sampler of
Few-Step Sampling, taking turns; a random SD3 transformer of width 384. Needs ComfyUI's requirements
(make comfy has them).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests.comfy.harness import boot  # noqa: E402
from tests.comfy.testkit import conditioning  # noqa: E402
from tests.tiny.recipes import flow_recipe  # noqa: E402

STARTUP = """
import asyncio, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.comfy import harness
pack, harness.PACK = harness.PACK, harness.TESTKIT
harness.boot(Path({comfyui!r}), Path(tempfile.mkdtemp()))
fewstep = [name for name in sys.modules if name.split(".")[0] == "fewstep"]
for name in fewstep:
    del sys.modules[name]
wall, cpu = time.perf_counter(), time.process_time()
asyncio.run(harness._load(pack, "custom_nodes"))
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main() -> None:
    """Measure and print markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if "COMFYUI_PATH" not in os.environ:
        sys.exit("say where ComfyUI is: COMFYUI_PATH=path/of/ComfyUI")
    comfyui = Path(os.environ["COMFYUI_PATH"]).resolve()
    startup(comfyui, options.starts)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        steps(comfyui, Path(name), options.repeats)


def startup(comfyui: Path, starts: int) -> None:
    """Loading the pack, in processes that have loaded ComfyUI."""
    program = STARTUP.format(root=str(ROOT), comfyui=str(comfyui))
    found = []
    for _ in range(starts):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        found.append([float(value) for value in done.stdout.split()[-2:]])
    print("\n| start-up of the pack | median | least | most |\n| --- | --- | --- | --- |")
    for label, values in zip(("wall", "processor"), zip(*found, strict=True), strict=True):
        spread = f"{min(values):.3f} s | {max(values):.3f} s"
        print(f"| {label} | {statistics.median(values):.3f} s | {spread} |")


def steps(comfyui: Path, folder: Path, repeats: int) -> None:
    """Four steps by core's euler and by ours."""
    booted = boot(comfyui, folder)
    guider, recipe = _guider(booted.folder), flow_recipe("sd3")
    import comfy.samplers  # pyright: ignore[reportMissingImports]

    from fewstep.comfy_nodes.few_step_sampler import build_sampling
    from fewstep.comfy_nodes.sockets import NamedRecipe

    ours, sigmas = build_sampling(guider.model_patcher, NamedRecipe(recipe, "benchmark"))
    samplers = {"core euler": comfy.samplers.ksampler("euler"), "Few-Step": ours}
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    made = {}
    for repeat in range(repeats + 3):
        for name, sampler in samplers.items():
            start = time.perf_counter()
            made[name] = guider.sample(
                noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=0
            )
            if repeat >= 3:  # the first ones load
                taken[name].append(time.perf_counter() - start)
    error = (made["Few-Step"] - made["core euler"]).norm() / made["core euler"].norm()
    ratios = [b / a for a, b in zip(*taken.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print("\n| sampler, 4 steps | median | to core euler (quartiles) |\n| --- | --- | --- |")
    for name, values in taken.items():
        ratio = "1" if name == "core euler" else f"{middle:.4f} ({low:.4f}-{high:.4f})"
        print(f"| {name} | {1e3 * statistics.median(values):.1f} ms | {ratio} |")
    print(f"\nrelative difference of the latents: {float(error):.1e}")


def _guider(folder: Path) -> Any:
    """A GUIDER over a random SD3 transformer."""
    import comfy.samplers  # pyright: ignore[reportMissingImports]
    import comfy.sd  # pyright: ignore[reportMissingImports]
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=64,
        joint_attention_dim=384,
        caption_projection_dim=384,
        pooled_projection_dim=256,
        pos_embed_max_size=32,
    )
    file = folder / "diffusion_models" / "width-384.safetensors"
    save_file(network.state_dict(), file)
    model = comfy.sd.load_diffusion_model(str(file))
    made = conditioning(0, 77, 384, 256)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[made["cond"], {"pooled_output": made["pooled"]}]]})
    guider.set_cfg(1.0)
    return guider


if __name__ == "__main__":
    main()
