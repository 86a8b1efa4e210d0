"""Time, start-up and memory of the runtime against diffusers, side by side.

    python benchmarks/runtime.py                       the digits pipeline
    python benchmarks/runtime.py --model sd15          a random pipeline of SD 1.5's size at 256 px
    python benchmarks/runtime.py --compile             torch.compile beside them (compiles first)
    python benchmarks/runtime.py --engines cpu openvino-bf16      and diffusers in bfloat16 too
    OPTIMUM_PYTHON=venv/bin/python python benchmarks/runtime.py     Optimum's pipeline too

Every arrangement draws the same four-step picture from the same prompt; arrangements take turns in
every round, and ratios are of medians of wall time. Cold starts and resident memory are measured in
fresh processes that import, load and draw one picture (memory on Linux only).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.optimum_peer import OptimumPeer  # noqa: E402
from fewstep.export.__main__ import main as export  # noqa: E402
from fewstep.loading import load_stock_pipeline  # noqa: E402
from fewstep.pipeline import FewStepPipeline  # noqa: E402
from fewstep.recipe import SIDECAR_NAME  # noqa: E402
from fewstep.runtime.few_step_runtime import FewStepRuntime  # noqa: E402
from fewstep.runtime.fused_runtime import FusedRuntime  # noqa: E402

PROMPT = "a handwritten seven"
Draw = Callable[[], np.ndarray | None]
COLD_DIFFUSERS = (
    "from fewstep.pipeline import FewStepPipeline\n"
    "pipe = FewStepPipeline.from_pretrained({base!r}, adapter={adapter!r}, probe=False)\n"
    "pipe({prompt!r}, seed=1).images[0].tobytes()\n"
)
COLD_RUNTIME = (
    "from fewstep.runtime.few_step_runtime import FewStepRuntime\n"
    "FewStepRuntime.load({folder!r}, provider={engine!r})({prompt!r}, seed=1).pixels.tobytes()\n"
)
COLD_FUSED = (
    "from fewstep.runtime.fused_runtime import FusedRuntime\n"
    "FusedRuntime.load({folder!r})({prompt!r}, seed=1).pixels.tobytes()\n"
)
# When the picture is there, and the peak of memory (ru_maxrss begins with that of the parent).
REPORT = (
    "import re, time; now = time.time()\n"
    "print(now, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
)


def main() -> None:
    """Measure and print a markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=("digits", "sd15"), default="digits")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--cold-repeats", type=int, default=3)
    parser.add_argument("--teacher-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser too")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["cpu", "openvino", "auto", "fused"],
        help="each holds the weights once: name few where memory is short",
    )
    parser.add_argument("--keep", type=Path, help="folder for the model and its export")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        root = options.keep or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        base, adapter = digits(root) if options.model == "digits" else sd15(root)
        folder = root / "exported"
        if not folder.exists():
            argv = ["onnx", "--base", base, "--out", str(folder), "--fused", "--force"]
            assert export([*argv, *(["--adapter", adapter] if adapter else [])]) == 0
        steady(options, base, adapter, folder)
        teacher(options, base, folder)
        cold(options, base, adapter, folder)


def digits(root: Path) -> tuple[str, str | None]:
    """The shipped flow teacher and a random adapter."""
    from fewstep.digits.weights import teacher_folder
    from tests.digits_exports import digits_adapter

    adapter = digits_adapter("sd3", root / "adapter.safetensors", 0.0)
    return str(teacher_folder("sd3")), str(adapter)


def sd15(root: Path) -> tuple[str, str | None]:
    """A random pipeline of SD 1.5's size, with a recipe beside it."""
    from benchmarks.sd15_size import save_sd15_size

    folder = root / "base"
    if not (folder / SIDECAR_NAME).exists():
        save_sd15_size(folder)
    return str(folder), None


def steady(options: Any, base: str, adapter: str | None, folder: Path) -> None:
    """Arrangements in turns, warm."""
    pipe: Any = FewStepPipeline.from_pretrained(base, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.fuse()  # the fastest form diffusers has
    draws: dict[str, Draw] = {"diffusers eager": lambda: np.asarray(pipe(PROMPT, seed=1).images)}
    if options.compile:
        draws["torch.compile"] = _compiled(base, adapter)
    if "openvino-bf16" in options.engines:
        draws["diffusers eager, bfloat16"] = _eager_bf16(base, adapter)
    threads = options.threads
    draws |= dict(_runtime(folder, name, threads) for name in options.engines)
    peer = None
    if "OPTIMUM_PYTHON" in os.environ:
        peer = OptimumPeer(os.environ["OPTIMUM_PYTHON"], folder, PROMPT, threads)
        draws["Optimum, ONNX Runtime"] = peer
    taken: dict[str, list[float]] = {name: [] for name in draws}
    first = {name: draw() for name, draw in draws.items()}
    for _ in range(options.repeats):
        for name, draw in draws.items():
            start = time.perf_counter()
            draw()
            taken[name].append(time.perf_counter() - start)
    if peer is not None:
        peer.close()
    reference = statistics.median(taken["diffusers eager"])
    wanted = np.asarray(first["diffusers eager"]).astype(int)
    print(f"\n{options.model}, four steps, {threads} threads, {options.repeats} rounds\n")
    print("| arrangement | median (quartiles) | to diffusers eager | largest of 255 | PSNR |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4)
        pixels = first[name]
        away = None if pixels is None else pixels - wanted
        ms = f"{1e3 * middle:.0f} ms ({1e3 * low:.0f}-{1e3 * high:.0f})"
        print(f"| {name} | {ms} | {middle / reference:.3f} | {_distance(away)} |")


def _distance(away: np.ndarray | None) -> str:
    """Largest difference and PSNR; nothing where the pictures cannot be compared."""
    if away is None:
        return " | "
    power = float(np.square(away.astype(float)).mean())
    psnr = f"{10 * np.log10(255**2 / power):.0f} dB" if power else ""
    return f"{np.abs(away).max()} | {psnr}"


def teacher(options: Any, base: str, folder: Path) -> None:
    """The student in four steps against the teacher in fifty with guidance, in turns."""
    stock: Any = load_stock_pipeline(base)
    stock.set_progress_bar_config(disable=True)
    draws: dict[str, Draw] = {
        "teacher, 50 steps, guidance 5, diffusers": lambda: (
            stock(PROMPT, num_inference_steps=50, guidance_scale=5.0, output_type="np").images
        ),
    }
    students = dict(_runtime(folder, name, options.threads) for name in options.engines)
    draws |= {f"student, 4 steps, {name}": draw for name, draw in students.items()}
    taken: dict[str, list[float]] = {name: [] for name in draws}
    for draw in students.values():
        draw()  # warm
    for _ in range(options.teacher_repeats):
        for name, draw in draws.items():
            start = time.perf_counter()
            draw()
            taken[name].append(time.perf_counter() - start)
    reference = statistics.median(next(iter(taken.values())))
    print("\n| end to end | median (least-most) | to the teacher |")
    print("| --- | --- | --- |")
    for name, values in taken.items():
        middle = statistics.median(values)
        spread = f"{min(values):.3f}-{max(values):.3f}"
        print(f"| {name} | {middle:.3f} s ({spread}) | {middle / reference:.4f} |")


def _runtime(folder: Path, engine: str, threads: int) -> tuple[str, Draw]:
    if engine == "fused":
        fused = FusedRuntime.load(folder, threads=threads)
        return "fused graph, cpu", lambda: fused(PROMPT, seed=1).pixels
    runtime = FewStepRuntime.load(folder, provider=engine, threads=threads)
    picked = f" ({runtime.provider})" if engine == "auto" else ""
    return f"runtime, {engine}{picked}", lambda: runtime(PROMPT, seed=1).pixels


def _compiled(base: str, adapter: str | None) -> Draw:
    pipe: Any = FewStepPipeline.from_pretrained(base, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.fuse()
    for name in ("transformer", "unet"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, torch.compile(getattr(pipe, name)))
    return lambda: np.asarray(pipe(PROMPT, seed=1).images)


def _eager_bf16(base: str, adapter: str | None) -> Draw:
    pipe: Any = FewStepPipeline.from_pretrained(base, adapter=adapter, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    if adapter:
        pipe.fuse()
    return lambda: np.asarray(pipe(PROMPT, seed=1).images)


def cold(options: Any, base: str, adapter: str | None, folder: Path) -> None:
    """Import, load and one picture, each in a process of its own."""
    given = {"base": base, "adapter": adapter, "folder": str(folder), "prompt": PROMPT}
    programs = {"diffusers": COLD_DIFFUSERS.format(**given)}
    for engine in options.engines:
        program = COLD_FUSED if engine == "fused" else COLD_RUNTIME
        programs[engine] = program.format(**given, engine=engine)
    taken: dict[str, list[float]] = {name: [] for name in programs}
    peak: dict[str, int] = {}
    for program in programs.values():  # what is made once, and kept, is made now
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    for _ in range(options.cold_repeats):
        for name, program in programs.items():
            start = time.time()
            done = subprocess.run(
                [sys.executable, "-c", program + REPORT], capture_output=True, text=True, check=True
            )
            end, most = done.stdout.strip().splitlines()[-1].split()
            taken[name].append(float(end) - start)
            peak[name] = int(most)
    print("\n| fresh process | first picture, median | to diffusers | peak memory | to diffusers |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in taken.items():
        middle, reference = statistics.median(values), statistics.median(taken["diffusers"])
        memory = peak[name] / peak["diffusers"]
        print(
            f"| {name} | {middle:.2f} s | {middle / reference:.3f} | {peak[name] / 1024:.0f} MiB | "
            f"{memory:.3f} |"
        )


if __name__ == "__main__":
    main()
