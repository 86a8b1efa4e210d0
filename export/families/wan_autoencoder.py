"""Wan's video decoder, a few latent frames at a time, with its memory as an input and an output.

Each convolution over time looks at two frames before its own, so a clip is decoded in pieces of any
length, the memory handed from call to call: the frames are those of one call for the whole clip,
and no more than a piece has to fit into memory.

The first latent frame is one picture, every later one several. A graph gives as many for each; what
stands before the first picture of a clip is not there for the convolutions, and the caller drops
it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import ExportError
from fewstep.export.part import Part, Port

KEPT = 2
"""Frames that a convolution over time remembers: its kernel is three frames long."""


@dataclass(frozen=True, slots=True)
class _Remembering:
    """A convolution over time, and how many times a latent's side the sides of its input are."""

    convolution: Any
    scale: int

    @property
    def channels(self) -> int:
        """Of the state, at the latents' height and width."""
        return self.convolution.in_channels * KEPT * self.scale**2


def _remembering(decoder: Any) -> list[_Remembering]:
    """Every convolution over time, in the order of their work."""
    found = [_Remembering(decoder.conv_in, 1)]
    found += [_Remembering(c, 1) for block in decoder.mid_block.resnets for c in _both(block)]
    scale = 1
    for block in decoder.up_blocks:
        found += [_Remembering(c, scale) for resnet in block.resnets for c in _both(resnet)]
        for upsampler in block.upsamplers or ():
            if upsampler.mode == "upsample3d":
                found.append(_Remembering(upsampler.time_conv, scale))
            scale *= 2
    return [*found, _Remembering(decoder.conv_out, scale)]


def _both(resnet: Any) -> tuple[Any, Any]:
    return resnet.conv1, resnet.conv2


@dataclass(slots=True)
class _Memory:
    """What convolutions remember, in the order of their work.

    Attributes:
        started: Whether a clip has begun before this call, shape (B, 1, 1, 1, 1).
        before: Last frames of the call before.
        after: Last frames of this call, of those that have worked.
    """

    started: Tensor
    before: list[Tensor]
    after: list[Tensor] = field(default_factory=list)

    def convolve(self, convolution: Any, sample: Tensor, missing: int) -> Tensor:
        """A convolution over time.

        Args:
            convolution: The next in order.
            sample: Frames, shape (B, C, F, H, W).
            missing: So many are not there where the clip begins with this call.
        """
        present = self._present(sample, missing)
        whole = torch.cat([self.before[len(self.after)], present], dim=2)
        self.after.append(whole[:, :, -KEPT:])
        _, _, rows, columns = convolution.weight.shape[1:]
        return functional.conv3d(
            whole, convolution.weight, convolution.bias, padding=(0, rows // 2, columns // 2)
        )

    def first_or(self, first: Tensor, other: Tensor, count: int) -> Tensor:
        """`first` at the clip's first `count` frames, `other` at the rest."""
        return torch.where(self.started | (_places(other) >= count), other, first)

    def _present(self, sample: Tensor, missing: int) -> Tensor:
        return sample if missing == 0 else self.first_or(torch.zeros_like(sample), sample, missing)


def _places(sample: Tensor) -> Tensor:
    return torch.arange(sample.shape[2])[:, None, None]


class _Decoder(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.remembering = _remembering(model.decoder)
        for name, values in (
            ("mean", model.config.latents_mean),
            ("deviation", model.config.latents_std),
        ):
            self.register_buffer(name, torch.tensor(values)[None, :, None, None, None])

    def forward(self, latent_sample: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        memory = self._recalled(state)
        latents = latent_sample * self.deviation.to(latent_sample.dtype)
        latents = latents + self.mean.to(latent_sample.dtype)
        pictures = self._decoded(self.model.post_quant_conv(latents), memory)
        return pictures.clamp(-1.0, 1.0), self._remembered(memory, state)

    def _recalled(self, state: Tensor) -> _Memory:
        begun, *parts = state.split([1, *(one.channels for one in self.remembering)], dim=1)
        height, width = state.shape[2:]
        shapes = [
            (-1, one.convolution.in_channels, KEPT, height * one.scale, width * one.scale)
            for one in self.remembering
        ]
        # only counted together: how the numbers lie in the state is nobody else's business
        before = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return _Memory(begun[:, :, :1, :1, None] > 0.5, before)

    def _remembered(self, memory: _Memory, state: Tensor) -> Tensor:
        height, width = state.shape[2:]
        begun = torch.ones_like(state[:, :1])
        parts = [
            kept.reshape(-1, one.channels, height, width)
            for kept, one in zip(memory.after, self.remembering, strict=True)
        ]
        return torch.cat([begun, *parts], dim=1)

    def _decoded(self, latents: Tensor, memory: _Memory) -> Tensor:
        decoder, rate = self.model.decoder, 1
        sample = memory.convolve(decoder.conv_in, latents, 0)
        first, *others = decoder.mid_block.resnets
        sample = _resnet(first, sample, memory, 0)
        for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
            sample = _resnet(resnet, attention(sample), memory, 0)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                sample = _resnet(resnet, sample, memory, rate - 1)
            for upsampler in block.upsamplers or ():
                if upsampler.mode == "upsample3d":
                    sample, rate = _doubled(upsampler, sample, memory, rate), 2 * rate
                sample = _enlarged(upsampler, sample)
        sample = decoder.nonlinearity(decoder.norm_out(sample))
        return memory.convolve(decoder.conv_out, sample, rate - 1)


def _resnet(block: Any, sample: Tensor, memory: _Memory, missing: int) -> Tensor:
    found = block.nonlinearity(block.norm1(sample))
    found = memory.convolve(block.conv1, found, missing)
    found = block.nonlinearity(block.norm2(found))
    found = memory.convolve(block.conv2, found, missing)
    return found + block.conv_shortcut(sample)


def _doubled(upsampler: Any, sample: Tensor, memory: _Memory, rate: int) -> Tensor:
    """Twice the frames; the clip's first stays one, and the others never see it."""
    found = memory.convolve(upsampler.time_conv, sample, rate)
    pairs = found.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    as_it_is = torch.stack([sample, sample], dim=3).flatten(2, 3)
    return memory.first_or(as_it_is, pairs, 2 * rate)


def _enlarged(upsampler: Any, sample: Tensor) -> Tensor:
    """Twice the sides; "nearest-exact" is "nearest" at a factor of two, which engines have."""
    frames = sample.transpose(1, 2).flatten(0, 1)
    doubled = functional.interpolate(frames, scale_factor=2.0, mode="nearest")
    found = upsampler.resample[1](doubled)
    return found.unflatten(0, (sample.shape[0], sample.shape[2])).transpose(1, 2)


def wan_decoder_part(model: Any) -> Part:
    """The decoder as `vae_decoder`; its state is zeros before the first latent frame.

    Args:
        model: AutoencoderKLWan.

    Raises:
        ExportError: It is that of Wan 2.2 5B.
    """
    config = model.config
    if config.is_residual or config.patch_size is not None:
        raise ExportError(
            "this autoencoder works on patches (Wan 2.2 5B), which is not exported; use the "
            "pipeline"
        )
    module = _Decoder(model)
    channels = 1 + sum(one.channels for one in module.remembering)
    factor, times = module.remembering[-1].scale, 2 ** sum(config.temperal_downsample)
    small = ("latent_height", "latent_width")
    state = ("batch_size", str(channels), *small)
    pixels = (f"num_frames * {times}", f"latent_height * {factor}", f"latent_width * {factor}")
    return Part(
        name="vae_decoder",
        module=module,
        inputs=(
            Port("latent_sample", ("batch_size", str(config.z_dim), "num_frames", *small)),
            Port("state", state),
        ),
        outputs=(
            Port("sample", ("batch_size", str(config.out_channels), *pixels)),
            Port("next_state", state),
        ),
        config={**dict(config), "_class_name": type(model).__name__},
        sizes={"batch_size": 2, "num_frames": 3, "latent_height": 4, "latent_width": 6},
    )
