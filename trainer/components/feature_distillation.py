"""Feature distillation: a smaller student's blocks must do what the teacher's do.

For students whose network is their own (`--lora.student smaller`): a block that was kept stands for
the dropped ones before it, and learns that best by imitation.

Source:
    SDXS, arXiv:2403.16627 (output and features); blocks fed with the teacher's own inputs as in
    block-wise distillation.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fewstep.trainer.components.features import FeatureTap, last_tensor, submodule, tapped
from fewstep.trainer.components.rollouts import Rollout
from fewstep.trainer.components.terms import Term, TermLoss
from fewstep.trainer.context import StepContext
from fewstep.trainer.parameters.policies import SmallerPolicy
from fewstep.trainer.roles import Role, acting_as


@dataclass(frozen=True, slots=True)
class BlockPair:
    """A block of the student and the run of teacher blocks it stands for.

    Attributes:
        student: Its path in the student's network.
        first: The first teacher block of the run.
        last: The last one, whose output is the target.
    """

    student: str
    first: str
    last: str


def block_pairs(policy: SmallerPolicy, teacher: nn.Module) -> tuple[BlockPair, ...]:
    """The layer map of a student that keeps some of the teacher's blocks."""
    kept = policy.kept(teacher)
    firsts = [0, *(index + 1 for index in kept[:-1])]
    return tuple(
        BlockPair(f"{policy.blocks}.{i}", f"{policy.blocks}.{a}", f"{policy.blocks}.{b}")
        for i, (a, b) in enumerate(zip(firsts, kept, strict=True))
    )


def relative_distance(mine: Tensor, target: Tensor) -> Tensor:
    """mean (mine - target)^2 / mean target^2, per sample, then averaged: layers count alike."""
    over = tuple(range(1, target.ndim))
    size = target.float().square().mean(dim=over).clamp(min=1e-8)
    return ((mine.float() - target.float()).square().mean(dim=over) / size).mean()


@dataclass(frozen=True, slots=True)
class FeatureKd(Term):
    """Prediction and features of the student on its own path, against the teacher's there.

    Attributes:
        rollout: Where both are asked: the student's input.
        pairs: Layer map; each student block is compared with the last of its teacher blocks.
    """

    rollout: Rollout
    pairs: tuple[BlockPair, ...]

    def loss(self, context: StepContext) -> TermLoss:
        rolled = context.rolled(self.rollout)
        levels = context.levels(rolled.now)
        role, sample, condition = context.student(rolled.now), rolled.sample, context.condition
        layers = [pair.student for pair in self.pairs]
        mine = tapped(context.backbone, role, sample, levels, condition, layers)
        with torch.no_grad():
            theirs = tapped(
                context.backbone,
                Role.TEACHER,
                sample,
                levels,
                condition,
                [pair.last for pair in self.pairs],
            )
        both = zip((*mine.features, mine.x0), (*theirs.features, theirs.x0), strict=True)
        loss = torch.stack([relative_distance(a, b) for a, b in both]).mean()
        return loss, {"loss/feature_kd": loss.item()}


@dataclass(frozen=True, slots=True)
class BlockKd(Term):
    """Each block of the student alone, fed with what the teacher's run of blocks was fed with.

    Errors do not pile up from block to block, so all learn from the first step on.

    Attributes:
        rollout: Where the teacher is asked: the student's input.
        pairs: Layer map.
    """

    rollout: Rollout
    pairs: tuple[BlockPair, ...]

    def loss(self, context: StepContext) -> TermLoss:
        rolled = context.rolled(self.rollout)
        backbone, role = context.backbone, context.student(rolled.now)
        student, teacher = backbone.network(role), backbone.network(Role.TEACHER)
        levels = context.levels(rolled.now)
        inputs = _InputTap(teacher, [pair.first for pair in self.pairs])
        targets = FeatureTap(teacher, [pair.last for pair in self.pairs])
        with torch.no_grad(), inputs, targets:
            backbone.x0(Role.TEACHER, rolled.sample, levels, context.condition)
        backbone.evaluations[role.name] += len(rolled.sample)  # all blocks once: one evaluation
        dtype = next(student.parameters()).dtype
        distances = []
        for pair, target in zip(self.pairs, targets.features, strict=True):
            args, kwargs = inputs.caught[pair.first]
            with acting_as(role):
                block = submodule(student, pair.student)
                output = last_tensor(block(*_as(args, dtype), **_as(kwargs, dtype)))
            distances.append(relative_distance(output, target))
        loss = torch.stack(distances).mean()
        return loss, {"loss/block_kd": loss.item()}


@final
class _InputTap:
    """Catches what some modules are called with inside its `with` block."""

    def __init__(self, network: nn.Module, layers: list[str]) -> None:
        self._modules = {layer: submodule(network, layer) for layer in layers}
        self._handles: list[RemovableHandle] = []
        self.caught: dict[str, tuple[Any, Any]] = {}

    def __enter__(self) -> None:
        for layer, module in self._modules.items():

            def catch(module: nn.Module, args: Any, kwargs: Any, layer: str = layer) -> None:
                self.caught[layer] = (args, kwargs)

            self._handles.append(module.register_forward_pre_hook(catch, with_kwargs=True))

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()


def _as(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of a block in another float precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_as(part, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _as(part, dtype) for key, part in value.items()}
    return value
