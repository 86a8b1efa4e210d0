"""Memory and time of a run, estimated from small steps and held against one real step.

seconds(batch) = a + b * batch                          fitted to two small batches
bytes(batch)   = weights + optimizer + c + d * batch    what autograd holds, counted
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewstep.trainer.loop import advance
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.quantise import stored_parts
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run

SMALL = (2, 8)
"""Batches the estimate is fitted to."""
ADAM_FLOATS = 2


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage.

    Attributes:
        name: Of the stage.
        num_steps: Its optimizer steps.
        step_s: Estimated seconds of one step at the run's batch size, critic steps included.
        step_s_measured: One real step; None where it was not run.
        activation_bytes: Estimated, of one accumulation part.
        activation_bytes_measured: Of the real step; None where it was not run.
    """

    name: str
    num_steps: int
    step_s: float
    step_s_measured: float | None
    activation_bytes: float
    activation_bytes_measured: float | None

    @property
    def time_error(self) -> float | None:
        """(estimate - measured) / measured of the seconds."""
        return _error(self.step_s, self.step_s_measured)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one device needs.

    Attributes:
        weights_bytes: Base, text encoders, decoder.
        trained_bytes: Adapters and own networks, their gradients and AdamW's two moments.
        stages: Time and activations.
        device: Where it was measured.
    """

    weights_bytes: int
    trained_bytes: int
    stages: tuple[StageCost, ...]
    device: str

    @property
    def peak_bytes(self) -> float:
        """Estimated, of the stage that needs most."""
        activations = max(stage.activation_bytes for stage in self.stages)
        return self.weights_bytes + self.trained_bytes + activations

    @property
    def memory_error(self) -> float | None:
        """(estimate - measured) / measured of the peak."""
        measured = [stage.activation_bytes_measured for stage in self.stages]
        if any(value is None for value in measured):
            return None
        held = max(value for value in measured if value is not None)
        return _error(self.peak_bytes, self.weights_bytes + self.trained_bytes + held)

    @property
    def total_hours(self) -> float:
        """Of the whole run, evaluations not counted."""
        return sum(stage.num_steps * stage.step_s for stage in self.stages) / 3600.0


def estimate(run: Run, *, verify: bool) -> Cost:
    """Run the smallest steps there are and extrapolate; with `verify`, one real step too.

    The run is changed by the steps: make a new one to train.
    """
    device = str(run.backbone.device)
    stages = tuple(_stage_cost(run, index, verify=verify) for index in range(len(run.stages)))
    return Cost(weight_bytes(run), trained_bytes(run.setting.cast), stages, device)


def enter_stage(run: Run, index: int) -> None:
    """Go to a stage as if it had begun: its critic's warm-up belongs to the first step only."""
    run.stage_index, run.stage_step = index, 1
    run.make_learners()


def _stage_cost(run: Run, index: int, *, verify: bool) -> StageCost:
    config = run.config
    part = config.batch_size // config.accumulation
    stage = run.stages[index]
    seconds, held = [], []
    _set_batch(run, SMALL[0], 1)
    _timed_step(run, index)  # first calls of a shape are slow
    for batch in SMALL:
        _set_batch(run, batch, 1)
        seconds.append(min(_timed_step(run, index) for _ in range(2)))
        held.append(saved_bytes(lambda: _timed_step(run, index)))
    width = SMALL[1] - SMALL[0]
    slope, per_sample = (max(0.0, (b[1] - b[0]) / width) for b in (seconds, held))
    start = max(0.0, seconds[0] - slope * SMALL[0])
    fixed = max(0.0, held[0] - per_sample * SMALL[0])
    measured_s = measured_bytes = None
    if verify:
        _set_batch(run, config.batch_size, config.accumulation)
        measured_s = min(_timed_step(run, index) for _ in range(2))
        measured_bytes = saved_bytes(lambda: _timed_step(run, index))
    run.config = config
    return StageCost(
        name=stage.name,
        num_steps=stage.num_steps,
        step_s=config.accumulation * (start + slope * part),
        step_s_measured=measured_s,
        activation_bytes=fixed + per_sample * part,
        activation_bytes_measured=measured_bytes,
    )


def _set_batch(run: Run, batch_size: int, accumulation: int) -> None:
    run.config = dataclasses.replace(
        run.config, batch_size=batch_size, accumulation=accumulation, budget=0
    )


def _timed_step(run: Run, index: int) -> float:
    enter_stage(run, index)
    started = time.perf_counter()
    advance(run)
    return time.perf_counter() - started


def weight_bytes(run: Run) -> int:
    """Bytes of every network of the pipeline, adapters not counted."""
    total = 0
    for part in run.backbone.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            named = (*part.named_parameters(), *part.named_buffers())
            stored = [part for n, t in named if ".updates." not in n for part in stored_parts(t)]
            total += sum(part.numel() * part.element_size() for part in stored)
    return total


def trained_bytes(cast: Cast) -> int:
    """Bytes of trained parameters, their gradients and AdamW's moments; the average has neither."""
    total = 0
    for name in cast.policies:
        for parameter in cast.parameters(Role(name)):
            copies = 2 + ADAM_FLOATS if parameter.requires_grad else 1
            total += copies * parameter.numel() * parameter.element_size()
    for module in cast.modules.values():
        total += sum((2 + ADAM_FLOATS) * p.numel() * p.element_size() for p in module.parameters())
    return total


def saved_bytes(action: Callable[[], object]) -> float:
    """The most bytes that autograd holds at one time while `action` runs.

    Counted by saved-tensor hooks, so it is the same on every device; parameters are not counted.
    """
    held: dict[int, int] = {}
    most, now = 0, 0

    class Saved:
        """One storage kept for a backward pass."""

        __slots__ = ("size", "tensor")

        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most, now
            self.tensor = tensor
            key = tensor.untyped_storage().data_ptr()
            is_new = not isinstance(tensor, torch.nn.Parameter) and held.get(key, 0) == 0
            self.size = tensor.untyped_storage().nbytes() if is_new else 0
            if is_new:
                held[key] = 1
                now += self.size
                most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.size
            if self.size:
                held.pop(self.tensor.untyped_storage().data_ptr(), None)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        action()
    gc.collect()
    return float(most)


def _error(estimated: float, measured: float | None) -> float | None:
    return None if not measured else (estimated - measured) / measured
