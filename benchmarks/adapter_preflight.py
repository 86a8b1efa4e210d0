"""Time of an adapter's preflight as a share of the time diffusers needs to load the same file.

    python benchmarks/adapter_preflight.py
    python benchmarks/adapter_preflight.py --rank 128 --repeats 20

The base is an SD3 transformer with random weights, the adapter a LoRA on every linear layer of its
blocks. Preflight is all that `FewStepPipeline` does before it touches the model: names and shapes
of the base, header, dtypes, every number of the file, coverage, ranks, expert. Loading is
`pipe.load_lora_weights` of stock diffusers, on the same base, followed by `unload_lora_weights`,
which is not counted, and the loading of the base itself (`from_pretrained` of a folder). All of it
alternates, so a busy machine slows all; the files are in the system's cache.

The verdict is on the median share of both loads together, which is what a user waits for. The share
of `load_lora_weights` alone is printed beside it: that call maps the file and, where dtypes agree,
reads no number of it before the first picture, while preflight reads every one, so with few large
matrices in float32 there is little to compare with.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fewstep.adapters import save_adapter
from fewstep.adapters.opening import open_adapter
from fewstep.adapters.preflight import coverage_of, preflight
from fewstep.adapters.values import check_values
from fewstep.pipeline.lora_layers import weight_shapes
from fewstep.recipe import Base, FewStepRecipe, Grid, Schedule

LIMIT = 0.10
stock: Any = diffusers
MISSING: dict[str, Any] = dict.fromkeys(
    ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    + ("tokenizer", "tokenizer_2", "tokenizer_3")
)
RECIPE = FewStepRecipe(
    base=Base(family="sd3", prediction="flow", schedule=Schedule(kind="flow", shift=1.0)),
    grids=(Grid(timesteps=(1000.0,), sigmas=(1.0, 0.0)),),
    default_steps=1,
)


def build_pipeline(layers: int, heads: int) -> Any:
    """StableDiffusion3Pipeline with nothing but a denoiser, random weights."""
    torch.manual_seed(0)
    transformer = stock.SD3Transformer2DModel(
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        joint_attention_dim=512,
        pooled_projection_dim=256,
    )
    scheduler = stock.FlowMatchEulerDiscreteScheduler()
    return stock.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **MISSING)


def write_adapter(path: Path, model: nn.Module, rank: int, dtype: Any) -> int:
    """A random LoRA on every linear layer of the blocks; gives the number of modules."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks."):
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features)
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank)
    save_adapter(path, tensors, recipe=RECIPE, rank=rank, alpha=rank, title="random", dtype=dtype)
    return len(tensors) // 2


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(pipe: Any, base: Path, path: Path, repeats: int) -> list[tuple[float, ...]]:
    """(preflight, of it coverage, of it values, LoRA load, base load) in seconds, per repeat."""

    def check() -> None:
        preflight(open_adapter(path), weight_shapes(pipe.transformer))

    header, shapes = open_adapter(path), weight_shapes(pipe.transformer)
    rows = []
    for _ in range(repeats + 1):
        times = [timed(check)]
        times.append(timed(lambda: coverage_of(header, shapes)))
        times.append(timed(lambda: check_values(header)))
        times.append(timed(lambda: pipe.load_lora_weights(str(path.parent), weight_name=path.name)))
        pipe.unload_lora_weights()
        times.append(timed(lambda: type(pipe).from_pretrained(base, **MISSING)))
        rows.append(tuple(times))
    return rows[1:]  # the first one imports and compiles


def spread(values: list[float], unit: str, scale: float) -> str:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    shown = [f"{scale * value:.3g}" for value in (statistics.median(values), low, high)]
    return f"{shown[0]} {unit} ({shown[1]}-{shown[2]})"


def main() -> int:
    """Print a table; 1 if preflight takes more than `LIMIT` of the time to load base and LoRA."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6, help="width is 64 times this")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    stock.utils.logging.set_verbosity_error()
    stock.utils.logging.disable_progress_bar()
    pipe = build_pipeline(options.layers, options.heads)
    count = sum(p.numel() for p in pipe.transformer.parameters())
    print(f"SD3 transformer, {count:,} parameters; LoRA rank {options.rank}")
    print(
        "| file | preflight | of it coverage | of it values | load_lora_weights | share |", end=""
    )
    print(" base load | share of both |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        pipe.save_pretrained(base)
        for dtype in ("bf16", "fp32"):
            path = Path(folder) / f"{dtype}.safetensors"
            modules = write_adapter(path, pipe.transformer, options.rank, dtype)
            whole, coverage, values, load, base_load = map(
                list, zip(*measure(pipe, base, path, options.repeats), strict=True)
            )
            shares = [check / lora for check, lora in zip(whole, load, strict=True)]
            of_both = [
                check / (lora + model)
                for check, lora, model in zip(whole, load, base_load, strict=True)
            ]
            worst = max(worst, statistics.median(of_both))
            columns = (
                f"{dtype}, {modules} modules, {path.stat().st_size / 1e6:.0f} MB",
                *(spread(times, "ms", 1e3) for times in (whole, coverage, values, load)),
                spread(shares, "%", 100.0),
                spread(base_load, "ms", 1e3),
                spread(of_both, "%", 100.0),
            )
            print(f"| {' | '.join(columns)} |", flush=True)
    verdict = "within" if worst <= LIMIT else "OVER"
    print(f"worst median share {100 * worst:.1f} %, {verdict} the limit of {100 * LIMIT:.0f} %")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
