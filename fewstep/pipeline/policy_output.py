"""A policy head in the place of a network's output layer, and the stock layer back in it.

    stock          norm_out(hidden, time embedding) -> proj_out -> (taken apart into pixels)
    with a head    PolicyNorm: norm and head, the wide output -> passed through -> the same

Both modules keep the stock one inside, so that it moves and is copied with the model and comes back
as it was. Hosts are the transformers of SD3, FLUX and Qwen-Image, which end alike.
"""

from typing import Any, cast, final

from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.normalization import AdaLayerNormContinuous
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.errors import AdapterError, PipelineError
from fewstep.heads.policy_head import PolicyHead
from fewstep.recipe import StepPolicy

NORM, OUTPUT = "norm_out", "proj_out"
TAKES_PIXELS_APART = (SD3Transformer2DModel,)
"""Hosts that unpack their tokens themselves; the pipeline does it for the others."""
HOSTS = (*TAKES_PIXELS_APART, FluxTransformer2DModel, QwenImageTransformer2DModel)


@final
class PolicyNorm(nn.Module):
    """The last norm with the head after it.

    Args:
        stock: The norm that was there.
        head: What follows it.
        pixels: Pixels of a token that the model takes apart after its output layer.
    """

    def __init__(self, stock: AdaLayerNormContinuous, head: PolicyHead, pixels: int) -> None:
        super().__init__()
        self.stock = stock
        self.head = head
        self.stock_linear: nn.Module | None = None
        self._pixels = pixels
        if head.norm_out is not None:
            self.stock_linear = stock.linear
            stock.linear = head.norm_out

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """The wide output of each token."""
        return self.head(self.stock(hidden, embedded), embedded, self._pixels)

    def give_back(self) -> AdaLayerNormContinuous:
        """The norm as it was."""
        if self.stock_linear is not None:
            cast(Any, self.stock).linear = self.stock_linear
        return self.stock


@final
class PassedThrough(nn.Module):
    """In the place of the output layer, whose work is done.

    Args:
        stock: The layer that was there.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, wide: Tensor) -> Tensor:
        """What came in."""
        return wide


def check_host(model: nn.Module, head: PolicyHead, policy: StepPolicy, file: str) -> None:
    """Check that a head is of this policy and has a place in this network.

    Args:
        model: The denoiser.
        head: Of the file.
        policy: Of the recipe.
        file: For messages.

    Raises:
        AdapterError: The head is of another policy, or of another network.
        PipelineError: The network is no host, or its output layer is taken.
    """
    if not isinstance(model, HOSTS):
        names = ", ".join(host.__name__ for host in HOSTS)
        raise PipelineError(
            f"{file} has a policy head, which {type(model).__name__} has no place for; hosts are "
            f"{names}"
        )
    norm, output = model.get_submodule(NORM), model.get_submodule(OUTPUT)
    taken = next((m for m in norm.modules() if isinstance(m, LoraLayer)), None)
    if isinstance(output, LoraLayer) or (taken is not None and head.norm_out is not None):
        raise PipelineError(
            f"{file} has a policy head, but a LoRA is on the output layers of "
            f"{type(model).__name__}, whose place it takes; use one without them"
        )
    if not isinstance(norm, AdaLayerNormContinuous) or not isinstance(output, nn.Linear):
        raise PipelineError(
            f"{file} has a policy head, but {NORM} and {OUTPUT} of this {type(model).__name__} are "
            f"{type(norm).__name__} and {type(output).__name__}; load the base as diffusers does"
        )
    _check_sizes(model, head, policy, output, file)


def install(model: nn.Module, head: PolicyHead) -> None:
    """Put a head on a network that `check_host` found right."""
    host, pixels = cast(Any, model), _pixels(model)
    norm = PolicyNorm(host.norm_out, head, pixels)
    device = host.proj_out.weight.device
    if device.type != "meta":  # offloading moves it when it is called
        norm.head.to(device)
    host.norm_out, host.proj_out = norm, PassedThrough(host.proj_out)
    if isinstance(model, TAKES_PIXELS_APART):
        host.out_channels = wide_channels(head, pixels)


def remove(model: nn.Module) -> None:
    """Give a network its own output layer back; nothing to do where there is no head."""
    host = cast(Any, model)
    if not isinstance(host.norm_out, PolicyNorm):
        return
    host.norm_out, host.proj_out = host.norm_out.give_back(), host.proj_out.stock
    if isinstance(model, TAKES_PIXELS_APART):
        host.out_channels = host.proj_out.out_features // _pixels(model)


def is_installed(model: nn.Module) -> bool:
    """Whether a head of ours is on it."""
    return isinstance(model.get_submodule(NORM), PolicyNorm)


def wide_channels(head: PolicyHead, pixels: int) -> int:
    """Channels of each pixel (or token) that a head gives."""
    width = head.means.out_features // pixels
    if head.logweights is None:
        return width
    return width + head.logweights.out_features // pixels + 1


def _check_sizes(
    model: nn.Module, head: PolicyHead, policy: StepPolicy, output: nn.Linear, file: str
) -> None:
    if head.is_mixture != (policy.kind == "gm"):
        raise AdapterError(
            f"{file}: its policy head is {'a' if head.is_mixture else 'no'} mixture, but the "
            f"recipe's sampler.policy.kind is {policy.kind!r}; use the recipe in the file"
        )
    wanted = policy.components * output.out_features
    if (head.width, head.means.out_features) != (output.in_features, wanted):
        raise AdapterError(
            f"{file}: its policy head goes from {head.width} to {head.means.out_features} values, "
            f"but {policy.components} components of {type(model).__name__} here go from "
            f"{output.in_features} to {wanted}; use an adapter made for this base"
        )
    if head.logweights is None:
        return
    pixels, weights = _pixels(model), head.logweights.out_features
    groups, rest = divmod(weights, policy.components * pixels)  # weights of one Gaussian in a pixel
    channels = output.out_features // pixels
    fits = groups == 1 if isinstance(model, TAKES_PIXELS_APART) else not channels % max(groups, 1)
    if rest or not groups or not fits:
        raise AdapterError(
            f"{file}: its policy head gives {weights} log weights for {policy.components} "
            f"components of {channels} channels, which is not the same number for each of their "
            "pixels; save the file again"
        )


def _pixels(model: nn.Module) -> int:
    if isinstance(model, TAKES_PIXELS_APART):
        return int(cast(Any, model).config.patch_size) ** 2
    return 1
