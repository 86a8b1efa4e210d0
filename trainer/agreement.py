"""What several processes make sure of before they train together.

Randomness is by name and weights are frozen, so equal settings, weights and checkpoints mean equal
runs; each is compared once, and whoever differs is named.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.draws import Draws
from fewstep.trainer.parallel import Processes
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.run_folder import flat_settings

PROBED = 64
"""Numbers of each tensor that a digest looks at: enough to tell two trainings apart."""


def agree_on_settings(config: TrainConfig, processes: Processes) -> None:
    """Same settings, and the same first draws from them.

    Raises:
        ConfigError: A process differs.
    """
    if processes.size == 1:
        return
    draws = Draws(config.seed, 0, 0, range(4), torch.device("cpu"))
    probe = draws.normal("agreement", (16,))
    shared = draws.shared_integer("agreement", 0, 2**31)
    settings = flat_settings(config.to_dict())
    processes.agree(
        {name: str(value) for name, value in settings.items()}
        | {"first draws": f"{digest([('normal', probe)])} {shared}"}
    )


def agree_on_weights(backbone: Backbone, processes: Processes) -> None:
    """Same weights in all parts of the pipeline, before anything is cut or packed.

    Raises:
        ConfigError: A process differs.
    """
    if processes.size == 1:
        return
    facts = {
        f"weights of {name}": digest(part.state_dict().items())
        for name, part in backbone.pipe.components.items()
        if isinstance(part, nn.Module)
    }
    processes.agree(facts)


def agree_on_start(run: Run) -> None:
    """Same checkpoint, and from here on the main process's trained parameters, bit for bit.

    Raises:
        ConfigError: A process found another checkpoint.
    """
    cast = run.setting.cast
    run.processes.agree({"a run at step": str(run.step)})
    run.processes.equalise(p for name in cast.policies for p in cast.parameters(Role(name)))
    for module in cast.modules.values():
        run.processes.equalise((*module.parameters(), *module.buffers()))


@torch.no_grad()
def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short digest of names, shapes and some numbers of each tensor."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.flatten()
        some = flat[:: max(1, len(flat) // PROBED)].double().cpu()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(some.numpy().tobytes())
    return sha.hexdigest()[:12]
