"""Weights in memory for distribution matching: one base with LoRA roles against three copies.

    python benchmarks/trainer_memory.py                 SD1.5's UNet, 859 M parameters, needs 13 GiB
    python benchmarks/trainer_memory.py --size tiny     seconds; shows that the script works

Each arrangement is built in a process of its own. It reports the bytes of all parameters and
buffers, and what the process's resident memory grew by while they were built and after each of
teacher, student and critic has been called once. Passes when the shared arrangement (adapters of
student, critic and the student's average included) is within 1.10 of one base copy by all three
measures. Optimizer states and activations are not part of the claim; three copies have larger ones.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fewstep.trainer.backbones.stable_diffusion import SdBackbone
from fewstep.trainer.config import LoraConfig
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role, acting_as

LIMIT = 1.10
LATENT_SIZE = 16
ROLES = (Role.TEACHER, Role.STUDENT, Role.CRITIC)
TEXT_WIDTH = 768
MEASURES = ("weight_bytes", "resident_bytes", "resident_after_calls_bytes")
SIZES = {  # channels per level; everything else is the class's default, which is SD1.5's UNet
    "sd15": (320, 640, 1280, 1280),
    "tiny": (64, 128, 256, 256),
    "warm-up": (32, 32, 32, 32),
}


def main() -> int:
    """Measure both arrangements, print the table, write the JSON; 0 unless the limit is broken."""
    arguments = _arguments()
    if arguments.part:
        print(json.dumps(measure(arguments.part, arguments.size)))
        return 0
    parts = {name: _in_own_process(name, arguments.size) for name in ("one", "shared", "three")}
    report = summarise(parts, arguments.size)
    print_table(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if report["verdict"] == "failed" else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--part", choices=("one", "shared", "three"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_own_process(part: str, size: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--part", part, "--size", size]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(part: str, size: str) -> dict[str, int]:
    """Build one arrangement and call every role; bytes of weights and of resident memory."""
    process = psutil.Process()
    _call(build_unet("warm-up"), Role.TEACHER)  # libraries take memory of their own at first use
    before = resident_bytes(process)
    if part == "shared":
        unet = build_unet(size)
        add_adapters(unet)
        networks = dict.fromkeys(ROLES, unet)
    elif part == "three":
        networks = {role: build_unet(size) for role in ROLES}
    else:
        networks = {Role.TEACHER: build_unet(size)}
    built = resident_bytes(process)
    for role, network in networks.items():
        _call(network, role)
    return {
        "weight_bytes": sum(weight_bytes(network) for network in set(networks.values())),
        "parameters": sum(p.numel() for p in networks[Role.TEACHER].parameters()),
        "resident_bytes": built - before,
        "resident_after_calls_bytes": resident_bytes(process) - before,
    }


def build_unet(size: str) -> UNet2DConditionModel:
    """Random float32 weights."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE, block_out_channels=SIZES[size], cross_attention_dim=TEXT_WIDTH
    )
    return unet.requires_grad_(False)


def add_adapters(unet: nn.Module) -> Cast:
    """The adapters the trainer holds by default (its moving average too), moved off zero.

    A fresh up matrix is pages of zeros that the system has not handed out yet: it would not show
    in resident memory.
    """
    config, generator = LoraConfig(), torch.Generator().manual_seed(0)
    cast = Cast(unet, {})
    ranks = {
        Role.STUDENT: config.rank,
        Role.AVERAGE: config.rank,
        Role.CRITIC: config.critic_rank,
    }
    for role, rank in ranks.items():
        policy = LoraPolicy(SdBackbone.lora_targets, rank, config.alpha)
        cast.add(role, policy, generator)
        with torch.no_grad():
            for parameter in cast.parameters(role):
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
    return cast


@torch.no_grad()
def _call(unet: UNet2DConditionModel, role: Role) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
    condition = torch.randn(1, 77, TEXT_WIDTH, generator=generator)
    with acting_as(role):
        unet(sample, torch.tensor([500]), condition)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of this process, garbage collected first."""
    gc.collect()
    return process.memory_info().rss


def summarise(parts: dict[str, dict[str, int]], size: str) -> dict[str, Any]:
    """Ratios to one base copy, by each measure, and the verdict.

    At other sizes than SD1.5's there is none: an adapter of fixed rank weighs more beside a small
    base, and a small process is mostly its allocator.
    """
    ratios = {
        name: {measure: part[measure] / parts["one"][measure] for measure in MEASURES}
        for name, part in parts.items()
    }
    holds = all(ratios["shared"][measure] <= LIMIT for measure in MEASURES)
    verdict = ("passed" if holds else "failed") if size == "sd15" else "not judged at this size"
    return {"size": size, "limit": LIMIT, "verdict": verdict, "ratios": ratios, "parts": parts}


def print_table(report: dict[str, Any]) -> None:
    """One line per arrangement."""
    names = {
        "one": "one base",
        "shared": "base + student, critic, average",
        "three": "three copies",
    }
    print(f"{'':32}{'weights':>20}{'resident':>20}{'after calls':>20}")
    for key, name in names.items():
        part, ratio = report["parts"][key], report["ratios"][key]
        cells = [f"{part[m] / 2**20:,.0f} MiB x{ratio[m]:.2f}" for m in MEASURES]
        print(f"{name:32}" + "".join(f"{cell:>20}" for cell in cells))
    parameters = report["parts"]["one"]["parameters"]
    print(f"base of {parameters:,} parameters; limit x{LIMIT:.2f}: {report['verdict']}")


if __name__ == "__main__":
    sys.exit(main())
