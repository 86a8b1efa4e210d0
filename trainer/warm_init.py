"""Start from an adapter that exists: a turbo LoRA or a full delta, cut to the run's rank."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.adapters.conversion.convert import convert_file
from fewstep.adapters.conversion.ranking import total_error
from fewstep.errors import ConfigError
from fewstep.trainer.context import Setting
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role

logger = logging.getLogger(__name__)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def start_from(file: Path, setting: Setting, frame: Frame, base: Path | None) -> None:
    """Put a file's weights into student, average and critic.

    The critic starts as the student: what it is asked about is what the student draws. Layers that
    the file does not change stay fresh.

    Args:
        file: Adapter file of any naming, rotations, or a full-weight student (file or folder).
        setting: The run's; its cast is changed.
        frame: The run's method and config.
        base: diffusers folder of the base, where there is one on this machine; needed for full
            weights and rotations, and the only proof that names and shapes fit.

    Raises:
        ConfigError: The file is missing, changes layers the run does not train, or the student is
            not a LoRA.
        AdapterError: It is damaged or does not fit the base.
    """
    lora, cast = frame.config.lora, setting.cast
    if lora.student != "lora":
        raise ConfigError(
            f"init starts a LoRA student, but lora.student is {lora.student!r}; leave one out"
        )
    if not file.exists():
        raise ConfigError(f"init file {file} does not exist; give an adapter file or a folder")
    tensors = read_factors(file, lora.rank, base, frame.backbone.family)
    roles = [*setting.route.roles(Role.STUDENT), *setting.route.roles(Role.AVERAGE)]
    if lora.critic == "lora":
        roles += [Role(name) for name in cast.policies if name.startswith(Role.CRITIC.name)]
    for role in roles:
        policy = cast.policies[role.name]
        assert isinstance(policy, LoraPolicy)
        mine = {name: tensor.clone() for name, tensor in cast.tensors(role).items()}
        _check_covered(tensors, mine, file)
        scale = policy.alpha / policy.rank
        cast.load(role, {name: _placed(t, name, tensors, scale) for name, t in mine.items()})


def read_factors(file: Path, rank: int, base: Path | None, family: str) -> dict[str, Tensor]:
    """PEFT names without component -> factors of at most `rank`, their scale multiplied in."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "init.safetensors"
        conversion = convert_file(
            file,
            target,
            "diffusers",
            base=base,
            family=None if base is not None else family,
            rank=rank,
            is_baked=True,
            is_scale_baked=True,
        )
        tensors = {name: tensor.float() for name, tensor in load_file(target).items()}
    if conversion.errors:
        logger.info(
            "init: %d layers of %s cut to rank %d, %.2g of the adapter's size is lost",
            conversion.modules,
            file,
            rank,
            total_error(conversion.errors),
        )
    return {_bare(name): t for name, t in tensors.items() if name.endswith((DOWN, UP))}


def _bare(name: str) -> str:
    for prefix in ("transformer.", "unet."):
        name = name.removeprefix(prefix)
    return name


def _check_covered(tensors: Mapping[str, Tensor], mine: Mapping[str, Tensor], file: Path) -> None:
    odd = sorted({name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)} - {
        name.removesuffix(DOWN) for name in mine if name.endswith(DOWN)
    })  # fmt: skip
    if odd:
        raise ConfigError(
            f"{file} changes {len(odd)} layers that this run does not train, the first is "
            f"{odd[0]}; add them to --lora.targets"
        )


def _placed(fresh: Tensor, name: str, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    """A file's factor in the shape of the role's: rows of zeros where its rank is smaller."""
    given = tensors.get(name)
    if given is None:
        return fresh
    placed = fresh.clone() if name.endswith(DOWN) else torch.zeros_like(fresh)
    if name.endswith(DOWN):
        placed[: len(given)] = given.to(fresh)
    else:
        placed[:, : given.shape[1]] = given.to(fresh) / scale
    return placed
