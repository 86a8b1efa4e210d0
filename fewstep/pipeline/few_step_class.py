"""The class of a wrapped pipeline: a subclass of its stock class, with the stock class's name.

diffusers finds classes by name (`model_index.json`, AutoPipeline) and components by the signature
of `__init__`, so the subclass keeps both and overrides only what sampling by a recipe needs.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.pipeline.image_to_image import start_index
from fewstep.schedulers import NoiseLayout

PACKING = ["latents", "batch_size", "num_channels_latents", "height", "width"]


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
    }
    # Which of these a pipeline has differs by class; there is no common interface to ask.
    for name, make in (
        ("prepare_latents", _prepare_latents_of),
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
    last = inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    has_rest = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - has_rest, last)

    @functools.wraps(stock.__call__)
    def __call__(self: Any, *args: Any, seed: Any = None, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        bound.pop("self")
        rest = bound.pop(parameters[-1].name, {}) if has_rest else {}
        return self._sample(stock.__call__, {**bound, **rest}, seed)

    vars(__call__)["__signature__"] = signature.replace(parameters=parameters)
    return __call__


def _prepare_latents_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    """First noise: always drawn in float32, and scaled to a start below full noise.

    torch draws other numbers in half precision, so a float16 pipeline would not share its noise
    with other hosts. Pipelines that start from an image run as they are: their VAE must see its
    own dtype.
    """
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        values = call.arguments
        dtype, is_ours = values.get("dtype"), values.get("latents") is None
        if "image" in signature.parameters or not isinstance(dtype, torch.dtype) or not is_ours:
            return stock(*call.args, **call.kwargs)
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
    """Image to image: start on the trained grid by noise level (`image_to_image`)."""
    signature = inspect.signature(stock)
    if "strength" not in signature.parameters:
        return stock

    @functools.wraps(stock)
    def get_timesteps(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        values = signature.bind(self, *args, **kwargs).arguments
        if values.get("denoising_start") is not None:  # SDXL base + refiner: not a strength
            return stock(self, *args, **kwargs)
        start = start_index(self.scheduler, values["strength"])
        self.scheduler.set_begin_index(start)
        timesteps = self.scheduler.timesteps[start:]
        return timesteps, len(timesteps)

    return get_timesteps


def _pack_latents_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    """FLUX and Qwen-Image reorder latents; fresh noise must be reordered the same way."""
    if list(inspect.signature(stock).parameters) != PACKING:
        return staticmethod(stock)  # another kind of packing (LTX): fresh noise is drawn packed

    @functools.wraps(stock)
    def _pack_latents(
        self: Any, latents: Tensor, batch_size: int, channels: int, height: int, width: int
    ) -> Tensor:
        def pack(noise: Tensor) -> Tensor:
            return stock(noise, len(noise), channels, height, width)

        packed = stock(latents, batch_size, channels, height, width)
        layout = NoiseLayout((channels, height, width), pack)
        self.scheduler.add_noise_layout(tuple(packed.shape[1:]), layout)
        return packed

    return _pack_latents
