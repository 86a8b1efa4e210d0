"""What phase experts cost per picture, policy by policy, and what one switch costs.

    python benchmarks/expert_switch.py [--repeats 15] [--rank 32] [--json FILE]

Pictures: an SD3 transformer of small width with random weights, four steps, two experts with LoRA
on every attention and feed-forward layer. Arrangements take turns within each round, so a busy
machine slows all of them; ratios are per round against the same pipeline without any adapter.

    one adapter     a LoRA that never changes: what LoRA arithmetic costs, without switching
    adapters, fused, hotswap     the three policies

Switches: alone, on a UNet with SDXL's layout (thin channels, so that counting layers is all that
takes time), beside `pipe.set_adapters`, which is what a callback would call.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from fewstep.adapters import save_adapter
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.lora_layers import layers_with
from fewstep.recipe import Base, Expert, FewStepRecipe, Grid, Schedule

stock: Any = diffusers
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
POLICIES = ("adapters", "fused", "hotswap")
SWITCH_LIMIT = 1.02
"""Switching may add two percent to what LoRA arithmetic costs anyway."""


def main() -> int:
    """Measure, print a table, fail above the limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "pictures": measure_pictures(Path(folder), options.rank, options.repeats),
            "switches": measure_switches(Path(folder), options.rank, options.repeats),
        }
    ratio = report["pictures"]["adapters"]["to_one_adapter"]["median"]
    report |= {"limit": SWITCH_LIMIT, "passed": ratio <= SWITCH_LIMIT}
    print_table(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


def measure_pictures(folder: Path, rank: int, repeats: int) -> dict[str, Any]:
    """Arrangement -> seconds and ratios."""
    pipes = {"none": FewStepPipeline.wrap(sd3_pipeline(), recipe=recipe("sd3", experts=False))}
    files = expert_files(sd3_pipeline().transformer, folder / "sd3", "sd3", "transformer", rank)
    pipes["one adapter"] = FewStepPipeline.wrap(
        sd3_pipeline(), adapter=files[0], recipe=recipe("sd3", experts=False)
    )
    for policy in POLICIES:
        pipes[policy] = FewStepPipeline.wrap(sd3_pipeline(), adapter=folder / "sd3", experts=policy)
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
        draw_sd3(pipe)
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            seconds[name].append(timed(lambda pipe=pipe: draw_sd3(pipe)))
    return {
        name: {
            "seconds": spread(values),
            "to_none": spread(ratios(values, seconds["none"])),
            "to_one_adapter": spread(ratios(values, seconds["one adapter"])),
        }
        for name, values in seconds.items()
    }


def measure_switches(folder: Path, rank: int, repeats: int) -> dict[str, Any]:
    """Way of switching -> milliseconds per switch."""
    expert_files(sdxl_pipeline().unet, folder / "sdxl", "sdxl", "unet", rank)
    found: dict[str, Any] = {}
    for policy in POLICIES:
        found |= measure_policy(policy, folder / "sdxl", repeats)
    return found


def measure_policy(policy: str, folder: Path, repeats: int) -> dict[str, Any]:
    """The same for one policy."""
    pipe: Any = FewStepPipeline.wrap(sdxl_pipeline(), adapter=folder, experts=policy)
    plan, switch = pipe.scheduler.plan, pipe.scheduler.before_call
    found: dict[str, Any] = {
        policy: per_switch(lambda i: switch(plan[3 * i]), repeats),
        f"{policy}, before an image": per_switch(
            lambda i: pipe._fewstep.experts.prepare(pipe), repeats
        ),
    }
    if policy == "adapters":
        names = [adapter.name for adapter in pipe.adapters]
        found["layers"] = len(layers_with(pipe.unet, names[0]))
        found["set_adapters of diffusers"] = per_switch(
            lambda i: pipe.set_adapters([names[i]]), repeats
        )
    return found


def per_switch(switch: Callable[[int], object], repeats: int) -> dict[str, float]:
    """Milliseconds of switching to and fro."""
    for index in (1, 0):
        switch(index)
    return spread([1e3 * timed(lambda i=i: switch(i % 2)) for i in range(1, 2 * repeats + 1)])


def recipe(family: str, *, experts: bool) -> FewStepRecipe:
    """Four steps, two experts."""
    if family == "sdxl":
        schedule = Schedule(
            kind="vp", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        )
        timesteps = (999.0, 749.0, 499.0, 249.0)
    else:
        schedule = Schedule(kind="flow", shift=3.0)
        timesteps = (1000.0, 900.0, 750.0, 500.0)
    levels = schedule.build()
    sigmas = (*(levels.sigma_of_timestep(t) for t in timesteps), 0.0)
    middle = (sigmas[1] + sigmas[2]) / 2.0
    return FewStepRecipe(
        base=Base(
            family=family, prediction="epsilon" if family == "sdxl" else "flow", schedule=schedule
        ),
        grids=(Grid(timesteps=timesteps, sigmas=sigmas, experts=(0, 0, 1, 1) if experts else ()),),
        default_steps=4,
        experts=(
            Expert(adapter="high_noise", sigma_high=1.0, sigma_low=middle),
            Expert(adapter="low_noise", sigma_high=middle, sigma_low=0.0),
        )
        if experts
        else (),
    )


def expert_files(
    model: nn.Module, folder: Path, family: str, component: Any, rank: int
) -> list[Path]:
    """Two files of random LoRA on every layer of `LAYERS`."""
    paths = []
    for number, name in enumerate(("high_noise", "low_noise")):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for module_name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module_name.endswith(LAYERS):
                down = torch.randn(rank, module.in_features, generator=generator)
                up = 0.01 * torch.randn(module.out_features, rank, generator=generator)
                tensors |= {
                    f"{module_name}.lora_A.weight": down,
                    f"{module_name}.lora_B.weight": up,
                }
        paths.append(
            save_adapter(
                folder / f"{name}.safetensors",
                tensors,
                recipe=recipe(family, experts=True),
                rank=rank,
                alpha=float(rank),
                title=name,
                component=component,
                metadata={"fewstep.phase": name},
            )
        )
    return paths


def sd3_pipeline() -> Any:
    """Width 384, 6 layers; no text encoders."""
    torch.manual_seed(0)
    transformer = stock.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=6,
        caption_projection_dim=384,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        out_channels=4,
    )
    missing = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return stock.StableDiffusion3Pipeline(
        vae=thin_vae(),
        transformer=transformer,
        scheduler=stock.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys((*missing, *tokenizers)),
    )


def sdxl_pipeline() -> Any:
    """SDXL's blocks (1, 2 and 10 transformer layers) with thin channels."""
    torch.manual_seed(0)
    unet = stock.UNet2DConditionModel(
        block_out_channels=(8, 16, 32),
        layers_per_block=2,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2, 10),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=4,
    )
    return stock.StableDiffusionXLPipeline(
        vae=thin_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=stock.DDIMScheduler(),
        add_watermarker=False,
    )


def thin_vae() -> Any:
    """Not called: pictures are measured as latents."""
    return stock.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        shift_factor=0.0,
    )


def draw_sd3(pipe: Any) -> None:
    """One picture of 32 x 32 latents with 77 text tokens."""
    pipe(
        prompt_embeds=torch.zeros(1, 77, 256),
        pooled_prompt_embeds=torch.zeros(1, 256),
        height=64,
        width=64,
        output_type="latent",
        seed=0,
    )


def timed(action: Callable[[], object]) -> float:
    """Wall seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Round by round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartile_low": low, "quartile_high": high}


def print_table(report: dict[str, Any]) -> None:
    """What was measured."""
    print(f"{report['threads']} thread(s), torch {report['torch']}")
    print(f"{'picture':16}{'ms':>10}{'to none':>10}  quartiles        {'to one':>8}  quartiles")
    for name, row in report["pictures"].items():
        none, one = row["to_none"], row["to_one_adapter"]
        print(
            f"{name:16}{1e3 * row['seconds']['median']:10.1f}{none['median']:10.3f}"
            f"  {none['quartile_low']:.3f} to {none['quartile_high']:.3f}"
            f"  {one['median']:8.3f}  {one['quartile_low']:.3f} to {one['quartile_high']:.3f}"
        )
    switches = report["switches"]
    print(f"one switch over {switches.pop('layers')} layers")
    for name, row in switches.items():
        print(
            f"{name:32}{row['median']:9.2f} ms"
            f"   {row['quartile_low']:.2f} to {row['quartile_high']:.2f}"
        )
    print(f"limit {report['limit']:.2f}: {'passed' if report['passed'] else 'FAILED'}")


if __name__ == "__main__":
    sys.exit(main())
