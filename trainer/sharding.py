"""A frozen base that no single device holds: its blocks are cut over the processes of a machine.

Every block is put together when it runs and cut again after it (FSDP2). Roles are added afterwards,
so their parameters are plain tensors that every process has whole; nothing of the base is trained,
so nothing is reduced. Machines do not share: each holds the whole base once, and only its own fast
links carry weights.
"""

from collections.abc import Iterator

import torch
from torch import nn

from fewstep.errors import ConfigError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.two_networks import TwoNetworks
from fewstep.trainer.parallel import Processes


def shard(backbone: Backbone, processes: Processes, device: torch.device) -> None:
    """Cut a backbone's denoiser, in place, and move this process's part to a device.

    Blocks are moved one by one, so the device never holds the whole network. From then on all
    processes of a machine must make the same calls in the same order.

    Args:
        backbone: Its denoiser frozen, on the CPU, before any role is added.
        processes: This one among its peers.
        device: Where to.

    Raises:
        ConfigError: There is one process only, or the denoiser has no blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if processes.size == 1:
        raise ConfigError(
            "shard cuts the base over processes and there is one; start several with accelerate "
            "launch or torchrun, or leave it out"
        )
    network = backbone.denoiser
    blocks = list(blocks_of(network))
    if not blocks:
        raise ConfigError(f"{type(network).__name__} has no blocks to cut; leave shard out")
    machines = processes.size // processes.per_machine
    names = ("machine", "place")
    shape = (machines, processes.per_machine)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)["place"]
    for module in (*blocks, network):  # the network itself takes what is in no block
        fully_shard(module, mesh=mesh)
    backbone.in_step = True
    if isinstance(network, TwoNetworks):
        network.in_step = True


def blocks_of(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks that hold nearly all of a diffusion network's weights, in the order they run.

    They are the members of its lists (`transformer_blocks`, `blocks`, `down_blocks`, ...) and a
    UNet's `mid_block`; of both networks where there are two.
    """
    networks = list(network.children()) if isinstance(network, TwoNetworks) else [network]
    for one in networks:
        for name, child in one.named_children():
            if isinstance(child, nn.ModuleList):
                yield from child
            elif name == "mid_block":
                yield child
