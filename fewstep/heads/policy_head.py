"""The output layer of a network that answers with a policy, as a file holds it.

It takes the place of a diffusion transformer's last linear layer: `means` is that layer N or K
times as wide, `logweights` and the log standard deviation are there for a mixture only. Training
may also change the norm before it, whose linear layer comes along then (`norm_out`).
"""

from collections.abc import Mapping
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import ShapeError

LOG_DEVIATION = "logstd"
"""A log standard deviation that is the same for all; `logstds.<i>` are layers that tell it."""


@final
class HeadLinear(nn.Linear):
    """A linear layer that computes in its own precision, whatever the network around it has."""

    def forward(self, input: Tensor) -> Tensor:
        """Shape (..., in) to (..., out), the dtype of the weight."""
        return super().forward(input.to(self.weight.dtype))


@final
class PolicyHead(nn.Module):
    """From what the network's last norm gives to the parameters of a policy.

    Args:
        tensors: By parameter name, the file's names without their prefix.

            means.weight (out, width), means.bias
            logweights.weight, logweights.bias                       of a mixture
            logstds.0.weight, ... logstds.<n>.weight (1, width)      silu before each of them,
                                                                     from the time embedding
            logstd ()                                                in their place
            norm_out.weight (2 width, width), norm_out.bias          where the norm was trained

    Raises:
        ShapeError: Names or shapes are not those of a head.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        left = dict(tensors)
        self.means = _layer(left, "means")
        self.is_mixture = "logweights.weight" in left
        self.logweights = _layer(left, "logweights") if self.is_mixture else None
        self.norm_out = _layer(left, "norm_out") if "norm_out.weight" in left else None
        self.logstds = nn.ModuleList(_layers(left) if self.is_mixture else ())
        fixed = left.pop(LOG_DEVIATION, None) if self.is_mixture else None
        if fixed is not None and fixed.numel() != 1:
            raise ShapeError(f"logstd of a policy head is one number, got {list(fixed.shape)}")
        self.register_buffer(LOG_DEVIATION, None if fixed is None else fixed.float().reshape(1))
        if left:
            raise ShapeError(
                f"{sorted(left)[0][:60]!r} has no place in a policy head (layers have a weight and "
                "a bias, logstds are counted from 0, logstd and logweights go with a mixture); "
                "save the file again"
            )
        self._check()

    @property
    def width(self) -> int:
        """Size of what the norm gives."""
        return self.means.in_features

    def log_deviation(self, embedded: Tensor) -> Tensor:
        """The log standard deviation of a mixture.

        Args:
            embedded: The time embedding that the last norm gets. Shape (B, width).

        Returns:
            Shape (B, 1).
        """
        if not len(self.logstds):
            return self.get_buffer(LOG_DEVIATION).expand(len(embedded), 1)
        for layer in self.logstds:
            embedded = layer(functional.silu(embedded))
        return embedded

    def forward(self, hidden: Tensor, embedded: Tensor, pixels: int) -> Tensor:
        """The wide output of each token.

        Args:
            hidden: What the norm gave. Shape (B, tokens, width).
            embedded: The time embedding. Shape (B, width).
            pixels: Pixels of a token that the model takes apart after its output layer; each has
                all channels of the policy then.

        Returns:
            Shape (B, tokens, pixels * channels), per pixel means, log weights, log deviation.
        """
        parts = [self.means(hidden).unflatten(-1, (pixels, -1))]
        if self.logweights is not None:
            parts.append(self.logweights(hidden).unflatten(-1, (pixels, -1)))
            deviation = self.log_deviation(embedded)[:, None, None]
            parts.append(deviation.expand(*parts[0].shape[:3], 1).to(parts[0].dtype))
        return torch.cat(parts, -1).flatten(-2)

    def _check(self) -> None:
        width = self.width
        wanted: dict[str, tuple[int | None, int]] = {"means": (None, width)}
        found = {"means": self.means}
        if self.logweights is not None:
            found["logweights"], wanted["logweights"] = self.logweights, (None, width)
        if self.norm_out is not None:
            found["norm_out"], wanted["norm_out"] = self.norm_out, (2 * width, width)
        layers = [cast(HeadLinear, layer) for layer in self.logstds]
        inner = [layer.out_features for layer in layers]
        for index, layer in enumerate(layers):
            size = 1 if index + 1 == len(layers) else None
            found[f"logstds.{index}"] = layer
            wanted[f"logstds.{index}"] = (size, [width, *inner][index])
        for name, layer in found.items():
            outputs, inputs = wanted[name]
            if layer.in_features != inputs or outputs not in (None, layer.out_features):
                raise ShapeError(
                    f"{name} of this policy head has {layer.in_features} inputs and "
                    f"{layer.out_features} outputs, wanted {inputs} and {outputs or 'any'}"
                )
        if self.is_mixture and bool(layers) == (self._buffers[LOG_DEVIATION] is not None):
            raise ShapeError(
                "a mixture's head tells its log deviation by layers logstds.0 ... or by the number "
                f"logstd, got {'both' if layers else 'neither'}; save the file again"
            )


def _layers(left: dict[str, Tensor]) -> list[HeadLinear]:
    found = []
    while f"logstds.{len(found)}.weight" in left:
        found.append(_layer(left, f"logstds.{len(found)}"))
    return found


def _layer(left: dict[str, Tensor], name: str) -> HeadLinear:
    """Takes a layer's two tensors away; float32, on the CPU."""
    weight, bias = left.pop(f"{name}.weight", None), left.pop(f"{name}.bias", None)
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        shapes = [None if one is None else list(one.shape) for one in (weight, bias)]
        raise ShapeError(
            f"a policy head has {name}.weight (out, in) and {name}.bias (out,), got {shapes[0]} "
            f"and {shapes[1]}"
        )
    layer = nn.utils.skip_init(HeadLinear, weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return cast(HeadLinear, layer)
