"""Running a pipeline to see what its network really gets, whatever the weights are.

The network runs as it is, but the scheduler is handed, in place of its output, what a perfect
network would say if all data were zeros. The noise of such a sample is simply its standard
deviation, so the level a sample is really at can be measured and compared with the level the
network is told; what share of it survives a step is the step's fresh noise.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.doctor.seen import SeenCall, SeenRun, SeenStep
from fewstep.doctor.zero_data import data_deviation, first_noise_deviation, zero_data_output
from fewstep.errors import AdapterError, FewstepError
from fewstep.pipeline.call_arguments import count_images
from fewstep.pipeline.guidance import call_parameters

DENOISERS = ("unet", "transformer", "transformer_2")
SAMPLE_NAMES = ("hidden_states", "sample", "x")
TIMESTEP_NAMES = ("timestep", "t")
STARTS = ("image", "video", "init_image")
MAX_STEPS = 10
"""A probe of more steps stops here: few-step trouble shows in few steps."""
SEED = 20_240
CLEAN = 1e-3
"""Below this deviation a sample counts as clean, and its direction as unknown."""


class EnoughSeenError(Exception):
    """Ends a probe early; never leaves this module."""


def probe(pipe: Any, arguments: Mapping[str, Any]) -> SeenRun:
    """Run a pipeline twice with one seed and say what its network and scheduler were given.

    Args:
        pipe: A stock pipeline, or a FewStepPipeline.
        arguments: How it is called. A generator and a latent output are added.

    Returns:
        What was seen; a pipeline that fails is told in `error`, not raised.
    """
    first = Recorder(pipe, arguments).run()
    if first.error is not None or not first.steps:
        return first
    second = Recorder(pipe, arguments).run()
    same = len(first.steps) == len(second.steps) and all(
        math.isclose(a.sample_noise, b.sample_noise, rel_tol=1e-5)
        for a, b in zip(first.steps, second.steps, strict=True)
    )
    return dataclasses.replace(first, is_repeatable=same)


class Recorder:
    """One run of a pipeline; what it changes on the pipeline it puts back.

    Args:
        pipe: The pipeline.
        arguments: How it is called.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self._pipe = pipe
        self._arguments = _probe_arguments(pipe, arguments)
        self._starts_from_image = any(self._arguments.get(name) is not None for name in STARTS)
        self._calls: list[SeenCall] = []
        self._steps: list[SeenStep] = []
        self._unit: float | None = None
        self._leftover: float | None = None

    def run(self) -> SeenRun:
        """Call the pipeline once."""
        error: Exception | None = None
        is_complete = True
        with ExitStack() as stack:
            said = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            for name in DENOISERS:
                model = self._pipe.components.get(name)
                if isinstance(model, nn.Module):
                    stack.enter_context(self._watched(name, model))
            stack.enter_context(self._watched_scheduler())
            stack.enter_context(_without_progress_bar(self._pipe))
            try:
                self._pipe(**self._arguments)
            except EnoughSeenError:
                is_complete = False
                self._pipe.maybe_free_model_hooks()
            except Exception as caught:  # any class and scheduler may fail in any way
                error = caught
        return SeenRun(
            scheduler=type(self._pipe.scheduler).__name__,
            num_images=count_images(self._arguments),
            steps=tuple(self._steps),
            is_complete=is_complete,
            leftover=self._leftover if is_complete else None,
            starts_from_image=self._starts_from_image,
            error=None if error is None else _sentence(error),
            is_adapters_fault=isinstance(error, AdapterError),
            said=tuple(dict.fromkeys(str(w.message) for w in said if w.category is UserWarning)),
        )

    @contextmanager
    def _watched(self, name: str, model: nn.Module) -> Iterator[None]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            sample = _argument(args, kwargs, SAMPLE_NAMES, 0)
            timestep = _argument(args, kwargs, TIMESTEP_NAMES, 1)
            rows = [torch.as_tensor(row) for row in sample]
            self._calls.append(
                SeenCall(
                    component=name,
                    told=float(torch.as_tensor(timestep).float().max()),
                    rows=len(rows),
                    noise=_deviation(torch.stack(rows)),
                    is_finite=all(bool(torch.isfinite(o).all()) for o in _tensors(out)),
                )
            )

        handle = model.register_forward_hook(after, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _watched_scheduler(self) -> Iterator[None]:
        scheduler = self._pipe.scheduler
        step: Callable[..., Any] = scheduler.step

        @functools.wraps(step)
        def watched(
            model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if len(self._steps) >= MAX_STEPS:
                raise EnoughSeenError
            noise = self._noise_of(scheduler, sample)
            table = torch.as_tensor(scheduler.timesteps).cpu()
            output = zero_data_output(scheduler, sample, noise).to(model_output.dtype)
            output = _with_variance(output, model_output)
            result = step(output, timestep, sample, *args, **kwargs)
            self._note_step(sample, result[0], timestep, table, noise)
            return result

        scheduler.step = watched
        try:
            yield
        finally:
            del scheduler.step

    def _noise_of(self, scheduler: Any, sample: Tensor) -> float:
        deviation = _deviation(sample)
        if self._unit is None:  # the first draw is not of deviation 1 to the last digit
            expected = deviation / first_noise_deviation(scheduler)
            self._unit = 1.0 if self._starts_from_image or expected == 0.0 else expected
        self._scale = self._unit * data_deviation(scheduler)
        return deviation / self._scale

    def _note_step(
        self, sample: Tensor, following: Tensor, timestep: Any, table: Tensor, noise: float
    ) -> None:
        unit = self._unit or 1.0
        told = torch.as_tensor(timestep).float().max()
        self._leftover = _deviation(following) / self._scale
        calls = (dataclasses.replace(call, noise=call.noise / unit) for call in self._calls)
        self._steps.append(
            SeenStep(
                calls=tuple(calls),
                timestep=float(told),
                is_in_table=bool((table.float() == told.cpu()).any()),
                sample_noise=noise,
                values=sample.numel(),
                kept=_correlation(sample, following, CLEAN * unit),
            )
        )
        self._calls = []


def _probe_arguments(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = call_parameters(type(pipe))
    given = {k: v for k, v in arguments.items() if k not in ("generator", "seed", "output_type")}
    if "output_type" in parameters:
        given["output_type"] = "latent"  # what the VAE does is not the probe's business
    return {**given, "generator": torch.Generator("cpu").manual_seed(SEED)}


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    # diffusers makes the attribute when it is first needed
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...], position: int
) -> Any:
    for name in names:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return args[position] if len(args) > position else torch.zeros(1)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _deviation(sample: Tensor) -> float:
    return float(sample.detach().cpu().double().std(correction=0))  # some GPUs have no float64


def _correlation(before: Tensor, after: Tensor, clean: float) -> float | None:
    if before.shape != after.shape or min(_deviation(before), _deviation(after)) < clean:
        return None
    a, b = before.detach().cpu().double().flatten(), after.detach().cpu().double().flatten()
    return float(nn.functional.cosine_similarity(a, b, dim=0))


def _with_variance(output: Tensor, wanted: Tensor) -> Tensor:
    """Models with a learned variance hand the scheduler twice the channels."""
    if output.shape == wanted.shape:
        return output
    return torch.cat([output, torch.zeros_like(output)], dim=1)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, FewstepError) else f"{type(error).__name__}: {text}"
