"""What two processes of a test do together; the tests look at what they leave in a folder."""

import dataclasses
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.errors import ConfigError
from fewstep.trainer import checkpoint
from fewstep.trainer.agreement import agree_on_start, agree_on_weights
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.loading import wrap_pipeline
from fewstep.trainer.config import (
    DataConfig,
    EvaluationConfig,
    GridConfig,
    LoraConfig,
    TrainConfig,
)
from fewstep.trainer.levels import levels_at
from fewstep.trainer.loop import advance, train
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.parallel import Processes
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.run_state import restore_run, save_run
from fewstep.trainer.setup import build_run
from fewstep.trainer.sharding import blocks_of, shard
from tests.trainer.backbone_cases import WAN22

BUDGET = 300
ONE = Processes()


def config_for(model: Path, out: Path, **changes: Any) -> TrainConfig:
    """DMD2 on four steps with random exits, two critic updates per step, on an untrained base.

    The run ends when its evaluations are spent, so progress and rates depend on all processes.
    """
    config = TrainConfig(
        model=str(model / "sd3"),
        data=DataConfig(prompts=str(model / "prompts.txt")),
        out=out,
        batch_size=4,
        budget=BUDGET,
        guidance_scale=2.0,
        max_sequence_length=1,
        checkpoint_every=1,
        sample_every=3,
        evaluation=EvaluationConfig(every=0),
        grid=GridConfig(num_steps=4, stochasticity=1.0),
        lora=LoraConfig(rank=2, critic_rank=2, alpha=2.0),
        method=Dmd2(match=MatchConfig(num_steps=4, critic_updates=2, critic_warmup=1)),
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


RUNS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "checkpointed": {"gradient_checkpointing": True},
    "sharded": {"shard": True},
    "sharded-checkpointed": {"shard": True, "gradient_checkpointing": True},
}
"""Name -> changes to the config of whole runs of two processes."""


def spawn(model: Path, out: Path, *, size: int = 2) -> None:
    """Run `work` in some processes; an error in one of them is raised here."""
    mp.spawn(work, (size, model, out), nprocs=size)


def work(rank: int, size: int, model: Path, out: Path) -> None:
    """One process: everything in turn, in the same order as its peers."""
    torch.set_num_threads(1)
    meet = (out / "meet").as_uri()
    dist.init_process_group("gloo", meet, timedelta(minutes=3), size, rank)
    processes = Processes(rank, size, per_machine=size)
    for name, changes in RUNS.items():
        train(config_for(model, out / name, **changes), processes=processes)
    interrupted(processes, model, out)
    run = finished(config_for(model, out / "sharded", shard=True), processes)
    pictures(run, out)
    facts = {
        "share": share_of_blocks(run),
        "reductions": reductions(run),
        "averages": averages(processes),
        "refusals": refusals(run, model, out),
    }
    (out / f"facts-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    for per_machine in (size, 1):
        two_networks(Processes(rank, size, per_machine), out)
    dist.destroy_process_group()


def half_a_run(config: TrainConfig, processes: Processes = ONE) -> None:
    """Leave a checkpoint in the middle."""
    run = build_run(config, processes)
    for _ in range(2):
        advance(run)
    save_run(run)


def interrupted(processes: Processes, model: Path, out: Path) -> None:
    """Two go on as two; two leave half a run to one; one left half a run to two."""
    half_a_run(config_for(model, out / "resumed"), processes)
    train(config_for(model, out / "resumed"), processes=processes)
    half_a_run(config_for(model, out / "two-then-one"), processes)
    train(config_for(model, out / "one-then-two"), processes=processes)


def finished(config: TrainConfig, processes: Processes = ONE) -> Run:
    """A run as its last checkpoint left it."""
    run = build_run(config, processes)
    last = checkpoint.latest(run.folder.checkpoints)
    assert last is not None
    restore_run(run, last)
    return run


PICTURES = ([0, 1, 0, 1, 1], 77)
"""Prompts and first seed."""


def pictures(run: Run, out: Path) -> None:
    """An odd number of samples, and fewer than there are processes."""
    found = {"five": run.sample(*PICTURES), "one": run.sample([1], 5)}
    save_file(found, out / f"pictures-{run.processes.rank}.safetensors")


def refusals(run: Run, model: Path, out: Path) -> dict[str, str]:
    """What each process says when they were started differently."""
    processes = run.processes
    seeded = config_for(model, out / "refused", seed=processes.rank)
    run.step = processes.rank
    other = wrap_pipeline(WAN22.build())
    with torch.no_grad():
        other.pipe.transformer_2.proj_out.weight.add_(1e-3 * processes.rank)
    return {
        "seed": message_of(lambda: train(seeded, processes=processes)),
        "weights": message_of(lambda: agree_on_weights(other, processes)),
        "checkpoint": message_of(lambda: agree_on_start(run)),
    }


def message_of(action: Callable[[], object]) -> str:
    """The sentence of the ConfigError it ends with."""
    try:
        action()
    except ConfigError as error:
        return str(error)
    return ""


def share_of_blocks(run: Run) -> float:
    """Numbers of the base's blocks that this process holds, as a share of all."""
    weights = [
        parameter
        for block in blocks_of(run.backbone.denoiser)
        for name, parameter in block.named_parameters()
        if ".updates." not in name
    ]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in weights]
    return sum(p.numel() for p in held) / sum(p.numel() for p in weights)


def reductions(run: Run) -> dict[str, int]:
    """all_reduce calls of one update of each player, two parts each."""
    run.config = dataclasses.replace(run.config, accumulation=2)
    run.stage_index = 0
    run.make_learners()
    original, calls = dist.all_reduce, list[int]()

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    found: dict[str, int] = {}
    for name, update in (("critic", lambda: run.update_critic(1)), ("student", run.update_student)):
        calls.clear()
        update()
        found[name] = len(calls)
    dist.all_reduce = original
    return found


def averages(processes: Processes) -> list[float | None]:
    """Gradients after averaging: reached by both (1 and 3), by one (4), by none."""
    both, one, none = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.full((2,), 1.0 + 2.0 * processes.rank)
    one.grad = torch.full((2,), 4.0) if processes.rank == 1 else None
    processes.average_gradients([both, one, none])
    return [None if p.grad is None else float(p.grad.mean()) for p in (both, one, none)]


def two_networks(processes: Processes, out: Path) -> None:
    """Wan 2.2 cut over a machine whose processes have samples of one network each."""
    backbone = wrap_pipeline(WAN22.build())
    backbone.denoiser.requires_grad_(False)
    shard(backbone, processes, torch.device("cpu"))
    gradients = wan_gradients(backbone, [processes.rank], processes)
    save_file(gradients, out / f"wan-{processes.per_machine}-{processes.rank}.safetensors")


def wan_gradients(
    backbone: Backbone, rows: list[int], processes: Processes = ONE
) -> dict[str, Tensor]:
    """The student's gradients of a mean over samples: row 0 is noisy, row 1 nearly clean."""
    cast = Cast(backbone.denoiser, {})
    generator = torch.Generator().manual_seed(1)
    cast.add(Role.STUDENT, LoraPolicy(backbone.lora_targets, 2, 2.0), generator)
    for parameter in cast.parameters(Role.STUDENT):
        parameter.data.normal_(generator=generator).mul_(0.2)
    sample = torch.randn(2, *backbone.latent_shape(32, 32, 5), generator=generator)[rows]
    levels = levels_at(backbone.schedule, torch.tensor([0.95, 0.3])[rows])
    condition = WAN22.condition().take(torch.tensor(rows))
    loss = backbone.x0(Role.STUDENT, sample, levels, condition).square().mean()
    parameters = cast.parameters(Role.STUDENT)
    loss.backward(inputs=parameters)
    processes.average_gradients(parameters)
    return {name: p.grad for name, p in cast.named(Role.STUDENT) if p.grad is not None}
