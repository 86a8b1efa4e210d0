"""How the processes of one run find each other: started by accelerate, torchrun or SLURM."""

import logging
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from fewstep.errors import ConfigError
from fewstep.trainer.parallel import Processes

logger = logging.getLogger(__name__)
TIMEOUT = timedelta(hours=2)
"""Longest wait for another process: encoding a data set into the cache is one process's work."""
OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process beside others.

    Args:
        environment: Of the process.
    """
    return int(environment.get("WORLD_SIZE", "1")) > 1


def join(environment: Mapping[str, str], device: str) -> Processes:
    """Meet the others: NCCL between GPUs, gloo on the CPU.

    Args:
        environment: Of the process; what accelerate and torchrun put there.
        device: As `TrainConfig.device`.

    Raises:
        ConfigError: The launcher's settings or the device do not fit a run of several processes.
    """
    from accelerate import PartialState

    for name, engine in OTHER_ENGINES.items():
        if environment.get(name, "false").lower() == "true":
            raise ConfigError(
                f"accelerate is configured for {engine}, which is not used here; run `accelerate "
                "config` again without it, and pass --shard to cut the frozen base over processes"
            )
    if environment.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        logger.warning("accelerate's mixed precision is not used; --precision is")
    on_cpu = is_on_cpu(device, environment)
    state = PartialState(
        cpu=on_cpu, backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl", timeout=TIMEOUT
    )
    size = state.num_processes
    per_machine = int(environment.get("LOCAL_WORLD_SIZE", str(size)))
    if size % per_machine:
        raise ConfigError(
            f"{size} processes cannot be {per_machine} on each machine; start as many on all"
        )
    return Processes(state.process_index, size, per_machine)


def is_on_cpu(device: str, environment: Mapping[str, str]) -> bool:
    """Whether the processes compute on the CPU; else each has a GPU of its own.

    Raises:
        ConfigError: The device is one for a single process, or there are too few.
    """
    if device == "cpu":
        return True
    if device not in ("auto", "cuda"):
        raise ConfigError(
            f"device is {device}, but {environment['WORLD_SIZE']} processes cannot share one; "
            "choose cuda, which gives each its own, or cpu"
        )
    found = torch.cuda.device_count()
    wants_cpu = environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    if device == "auto" and not found and not torch.backends.mps.is_available():
        return True
    if wants_cpu or int(environment.get("LOCAL_RANK", "0")) >= found:
        raise ConfigError(
            f"{found} GPUs for the processes of this machine, and each needs its own; start as "
            "many processes as there are GPUs, or pass --device cpu"
        )
    return False


def leave(processes: Processes) -> None:
    """Part when all are done."""
    if processes.size > 1:
        processes.wait()
        dist.destroy_process_group()
