"""Distillation++: in the first steps the teacher corrects the student's clean data.

    x0 <- (1 - scale) x0 + scale x0_teacher,    x0_teacher = teacher(renoise(x0, t'), t')

The teacher is the same network with the few-step adapter switched off, so nothing is loaded for it;
each refined step costs one more call. It sees the conditioning of the call just made, without
guidance: a second, unconditional pass is not there to be repeated. The noise comes from a stream of
its own, so the picture's own draws stay what they are, and scale 0 is the picture without it.

Source:
    Park et al. 2024, arXiv:2412.08871, alg. 1 (SDS as a proximal step: an interpolation).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError, PipelineError
from fewstep.noise_schedule import Level
from fewstep.pipeline.adapter_weights import DENOISERS
from fewstep.pipeline.attached_adapter import AttachedAdapter
from fewstep.pipeline.lora_layers import activate, active_adapters, layers_with, plain_model
from fewstep.pipeline.network_call import NetworkCall, clock_of
from fewstep.sampling import add_noise, to_x0
from fewstep.schedulers import FewStepScheduler
from fewstep.schedulers.fresh_noise import Generators
from fewstep.trajectory import PlannedStep

OWN_STREAM = 0x7EAC4E12
"""Turns a picture's seed into that of the refinement's noise."""
AGREEMENT = 2e-2
"""Relative; half precision differs by this much between the pipeline's arithmetic and ours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRefine:
    """How much the teacher corrects.

    Attributes:
        scale: Weight of the teacher's clean data, 0 to 1; small, as one teacher call predicts a
            mean of what it could be.
        steps: How many of the first steps are corrected.
        renoise: Sigma at which the teacher looks; None takes the level the step ends at.

    Raises:
        ConfigError: A value is out of range.
    """

    scale: float = 0.1
    steps: int = 1
    renoise: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= 1.0 or self.steps < 1:
            raise ConfigError(
                f"teacher_refine needs a scale of 0 to 1 and steps >= 1, got {self.scale:g} and "
                f"{self.steps}"
            )
        if self.renoise is not None and not 0.0 < self.renoise <= 1.0:
            raise ConfigError(
                f"teacher_refine.renoise is a sigma above 0 and up to 1, got {self.renoise:g}"
            )


@contextmanager
def refining(
    pipe: Any,
    options: TeacherRefine | None,
    adapters: Sequence[AttachedAdapter],
    generator: Generators,
) -> Iterator[None]:
    """Inside, a wrapped pipeline's first steps are refined; nothing without options.

    Args:
        pipe: The wrapped pipeline.
        options: What the caller asked for.
        adapters: What is attached; switched off for the teacher.
        generator: The call's own; only its seed is looked at.

    Raises:
        PipelineError: There is no adapter that could be switched off.
    """
    if options is None:
        yield
        return
    names = _names_to_switch_off(adapters)
    scheduler: FewStepScheduler = pipe.scheduler
    refiner = _Refiner(pipe, scheduler, options, names, _own_stream(generator))
    before = scheduler.refine_x0
    with ExitStack() as stack:
        for name in DENOISERS:
            model = pipe.components.get(name)
            if isinstance(model, nn.Module):
                stack.enter_context(refiner.watching(model))
        scheduler.refine_x0 = refiner
        try:
            yield
        finally:
            scheduler.refine_x0 = before


class _Refiner:
    """The hook: keeps the last call of a network and repeats it without the adapter."""

    def __init__(
        self,
        pipe: Any,
        scheduler: FewStepScheduler,
        options: TeacherRefine,
        names: Sequence[str],
        generator: Generators,
    ) -> None:
        self._class_name = type(pipe).__name__
        self._scheduler = scheduler
        self._options = options
        self._names = names
        self._generator = generator
        self._calls: list[NetworkCall] = []
        self._is_asking = False
        self._index = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        plain = plain_model(model) or model
        signature = inspect.signature(plain.forward)

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
            if not self._is_asking:
                values = signature.bind(*args, **kwargs).arguments
                self._calls.append(NetworkCall(model, dict(values), out))

        handle = model.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, x0: Tensor, planned: PlannedStep) -> Tensor:
        """Refined clean data, the shape and dtype of `x0`."""
        calls, self._calls = self._calls, []
        self._index += 1
        if self._index > self._options.steps:
            return x0
        call = self._checked(calls, x0, planned)
        level = self._level(planned)
        noise = self._scheduler.draw_noise(x0, self._generator)
        seen = add_noise(x0, noise.to(x0), level)
        with _switched_off(call.model, self._names):
            self._is_asking = True
            try:
                output = call.repeat(seen, clock_of(self._class_name, call.model, level.timestep))
            finally:
                self._is_asking = False
        teacher = to_x0(self._prediction, output.to(x0), seen, level)
        return (1.0 - self._options.scale) * x0 + self._options.scale * teacher

    @property
    def _prediction(self) -> Any:
        return self._scheduler.recipe.base.prediction

    def _level(self, planned: PlannedStep) -> Level:
        schedule = self._scheduler.recipe.base.schedule.build()
        sigma = self._options.renoise
        if sigma is not None:
            return schedule.level(schedule.timestep_of_sigma(sigma), sigma)
        if planned.following.sigma == 0.0:
            raise PipelineError(
                "teacher_refine reached the last step, which ends at clean data; refine fewer "
                "steps than the grid has, or pass its renoise"
            )
        return planned.following

    def _checked(
        self, calls: Sequence[NetworkCall], x0: Tensor, planned: PlannedStep
    ) -> NetworkCall:
        """The one call of this step, proven to be read as the pipeline reads it."""
        if len(calls) != 1 or calls[0].batch_size != len(x0):
            raise PipelineError(
                f"teacher_refine needs one network pass per step, but {self._class_name} made "
                f"{len(calls)} for {len(x0)} images here; sample without guidance"
            )
        call = calls[0]
        told = clock_of(self._class_name, call.model, planned.level.timestep)
        # half precision networks are told a rounded time
        if not call.is_told(told) or not self._is_read_right(call, x0, planned):
            raise PipelineError(
                f"teacher_refine does not know how {self._class_name} calls its network (it was "
                f"told {call.told:g} at timestep {planned.level.timestep:g}); leave it out"
            )
        return call

    def _is_read_right(self, call: NetworkCall, x0: Tensor, planned: PlannedStep) -> bool:
        sample, output = call.sample_like(x0), call.output_like(x0)
        if sample is None or output is None:
            return False
        ours = to_x0(self._prediction, output, sample, planned.reading)
        return float((ours - x0).abs().max()) <= AGREEMENT * float(x0.abs().max() + 1.0)


@contextmanager
def _switched_off(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Without our adapters; a style LoRA of the user's stays on."""
    mine = (layer for name in names for layer in layers_with(model, name).values())
    layers = {id(layer): layer for layer in mine}
    active = [(layer, active_adapters(layer)) for layer in layers.values()]
    for layer, on in active:
        activate(layer, [name for name in on if name not in names])
    try:
        yield
    finally:
        for layer, on in active:
            activate(layer, on)


def _names_to_switch_off(adapters: Sequence[AttachedAdapter]) -> tuple[str, ...]:
    if not adapters:
        raise PipelineError(
            "teacher_refine needs a few-step adapter to switch off, and none is attached; "
            "pass adapter= when loading"
        )
    if any(adapter.is_fused for adapter in adapters):
        raise PipelineError(
            "teacher_refine needs to switch the few-step adapter off, but it is fused into the "
            "weights; load it unfused"
        )
    odd = next((adapter for adapter in adapters if adapter.kind != "lora"), None)
    if odd is not None:
        raise PipelineError(
            f"teacher_refine needs to switch the few-step adapter off, but {odd.path.name} is of "
            f"kind {odd.kind!r}, which is more than LoRA layers; leave teacher_refine out"
        )
    return tuple(adapter.name for adapter in adapters)


def _own_stream(generator: Generators) -> Generators:
    """Generators of their own: the same for the same seeds, never the pictures' draws."""
    if isinstance(generator, list):
        return [_derived(one) for one in generator]
    return _derived(generator)


def _derived(generator: torch.Generator | None) -> torch.Generator:
    own = torch.Generator()
    if generator is None:
        own.seed()  # from the system: drawing a seed would move torch's global stream
        return own
    return own.manual_seed(generator.initial_seed() ^ OWN_STREAM)
