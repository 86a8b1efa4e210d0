"""The class of a wrapped pipeline: a subclass of its stock class, with the stock class's name.

diffusers finds classes by name (`model_index.json`, AutoPipeline) and components by the signature
of `__init__`, so the subclass keeps both and overrides only what sampling by a recipe needs.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.errors import PipelineError
from fewstep.pipeline.image_to_image import begin
from fewstep.schedulers import NoiseLayout
from fewstep.start_rules import DEFAULT_START_RULE


@functools.cache
def few_step_class(mixin: type, stock: type) -> type:
    """The subclass of a stock pipeline class that samples by a recipe.

    Args:
        mixin: FewStepPipeline.
        stock: The stock class.
    """
    overrides: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__call__": _call_of(stock),
        "_strength_rule": DEFAULT_START_RULE,
    }
    # Which of these a pipeline has differs by class; there is no common interface to ask.
    for name, make in (
        ("prepare_latents", _prepare_latents_of),
        ("prepare_audio_latents", _prepare_latents_of),  # LTX-2
        ("get_timesteps", _get_timesteps_of),
        ("_pack_latents", _pack_latents_of),
    ):
        if hasattr(stock, name):
            overrides[name] = make(getattr(stock, name))
    return type(stock.__name__, (mixin, stock), overrides)


def stock_class(pipe: DiffusionPipeline) -> type:
    """The stock class behind a wrapped pipeline."""
    return type(pipe).__mro__[2]


def _call_of(stock: type) -> Callable[..., Any]:
    signature = inspect.signature(stock.__call__)
    added: dict[str, Any] = {"seed": None, "teacher_refine": None}
    if _starts_from_strength(stock):
        added["strength_rule"] = DEFAULT_START_RULE
    parameters = list(signature.parameters.values())
    has_rest = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    extra = [inspect.Parameter(name, keyword_only, default=added[name]) for name in added]
    at = len(parameters) - has_rest
    parameters[at:at] = extra

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_strength_rule" in vars(self):  # its scheduler holds the state of that picture
            raise PipelineError(
                "this pipeline is in the middle of a picture; draw another one after it, or with a "
                "pipeline of its own (from_pipe, then wrap)"
            )
        ours = {name: kwargs.pop(name, default) for name, default in added.items()}
        if not has_rest:
            _check_known(stock, kwargs, signature)
        bound = signature.bind(self, *args, **kwargs).arguments
        bound.pop("self")
        rest = bound.pop(parameters[-1].name, {}) if has_rest else {}
        self._strength_rule = ours.get("strength_rule", DEFAULT_START_RULE)
        try:
            return self._sample(
                stock.__call__, {**bound, **rest}, ours["seed"], ours["teacher_refine"]
            )
        finally:
            del self._strength_rule

    vars(__call__)["__signature__"] = signature.replace(parameters=parameters)
    return __call__


def _check_known(stock: type, given: dict[str, Any], signature: inspect.Signature) -> None:
    for name in given:
        if name not in signature.parameters:
            raise PipelineError(
                f"{stock.__name__} of diffusers {diffusers.__version__} takes no {name}; drop it, "
                "or use a pipeline class that takes it"
            )


def _starts_from_strength(stock: Any) -> bool:
    own = getattr(stock, "get_timesteps", None)
    return own is not None and "strength" in inspect.signature(own).parameters


def _prepare_latents_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    """First noise: always drawn in float32, and scaled to a start below full noise.

    torch draws other numbers in half precision, so a float16 pipeline would not share its noise
    with other hosts. Pipelines that take an image, or noise whatever they take (a video) to a
    timestep, run as they are: their VAE must see its own dtype.
    """
    signature = inspect.signature(stock)
    has_picture = not {"image", "timestep"}.isdisjoint(signature.parameters)

    @functools.wraps(stock)
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        values = call.arguments
        dtype, is_ours = values.get("dtype"), values.get("latents") is None
        if has_picture or not isinstance(dtype, torch.dtype) or not is_ours:
            return _scale_whole_noise(self, values, stock(*call.args, **call.kwargs))
        values["dtype"] = torch.float32
        _shrink_to_first_size(self, values)
        made = stock(*call.args, **call.kwargs)
        # Flow pipelines know no init_noise_sigma; those of the VP family have applied it.
        scale = self.scheduler.init_noise_sigma if self.scheduler.is_flow else 1.0
        if isinstance(made, Tensor):
            return (scale * made).to(dtype)
        latents, *others = made
        return ((scale * latents).to(dtype), *(_cast(other, dtype) for other in others))

    return prepare_latents


def _scale_whole_noise(pipe: Any, values: dict[str, Any], made: Any) -> Any:
    """Inpainting at strength 1 begins with noise alone, which flow pipelines leave unscaled."""
    is_whole = values.get("is_strength_max", False) and values.get("latents") is None
    if not is_whole or not pipe.scheduler.is_flow:
        return made
    latents, *others = made
    return (pipe.scheduler.init_noise_sigma * latents, *others)


def _shrink_to_first_size(pipe: Any, values: dict[str, Any]) -> None:
    """A scale ladder's first sample is smaller than the picture asked for."""
    first = pipe.scheduler.plan[0].size
    if first == 1.0 or not {"height", "width"} <= values.keys():
        return
    factor = pipe.vae_scale_factor
    pipe.scheduler.ladder.start(values["height"] // factor, values["width"] // factor)
    height, width = pipe.scheduler.ladder.size(first)
    values["height"], values["width"] = factor * height, factor * width


def _cast(value: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_float else value


def _get_timesteps_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Image to image: start on the trained grid by noise level (`start_rules`)."""
    signature = inspect.signature(stock)
    if "strength" not in signature.parameters:
        return stock

    @functools.wraps(stock)
    def get_timesteps(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        values = signature.bind(self, *args, **kwargs).arguments
        if values.get("denoising_start") is not None:  # SDXL base + refiner: not a strength
            return stock(self, *args, **kwargs)
        timesteps = begin(self.scheduler, values["strength"], self._strength_rule)
        count = len(self.scheduler.plan) - self.scheduler.begin_index
        if "sigmas" in values:  # LTX also wants to know the noise of its first sample
            return self.scheduler.sigmas[-count - 1 :], timesteps, count
        return timesteps, count

    return get_timesteps


def _pack_latents_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    """FLUX, Qwen-Image, LTX and others reorder latents; fresh noise must be reordered likewise.

    Some classes have it as a method (Krea 2), most as a static one, and what follows the latents
    differs; only a batch size among it changes with the noise.
    """
    signature = inspect.signature(stock)
    is_method = next(iter(signature.parameters)) == "self"

    @functools.wraps(stock)
    def _pack_latents(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        call = signature.bind(*((self, *args) if is_method else args), **kwargs)

        def pack(latents: Tensor) -> Tensor:
            values = {**call.arguments, "latents": latents}
            if "batch_size" in values:
                values["batch_size"] = len(latents)
            return stock(**values)

        latents = call.arguments["latents"]
        packed = pack(latents)
        layout = NoiseLayout(tuple(latents.shape[1:]), pack)
        self.scheduler.add_noise_layout(tuple(packed.shape[1:]), layout)
        return packed

    return _pack_latents
