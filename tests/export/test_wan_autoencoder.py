"""Wan's decoder in pieces gives the frames of the stock decoder, which takes the clip as a whole.

Oracle: AutoencoderKLWan.decode.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import ExportError
from fewstep.export.families.wan_autoencoder import wan_decoder_part
from fewstep.export.part import Part
from tests.tiny.parts import stock

MEAN, DEVIATION = [0.1, -0.2, 0.0, 0.3], [1.5, 0.8, 1.0, 1.2]
LATENTS = (2, 4, 5, 3, 4)
PIECES = ((1, 1, 1, 1, 1), (5,), (2, 3), (1, 4))


def autoencoder(**changes: Any) -> Any:
    """Biases are drawn too: what stands before the clip shows through them."""
    torch.manual_seed(0)
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    statistics = {"latents_mean": MEAN, "latents_std": DEVIATION}
    model = stock.AutoencoderKLWan(**(sizes | statistics | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


def by_stock(model: Any, latents: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v)[None, :, None, None, None] for v in (MEAN, DEVIATION))
    with torch.no_grad():
        return model.decode(latents * deviation + mean, return_dict=False)[0]


def by_part(part: Part, latents: Tensor, pieces: Sequence[int]) -> Tensor:
    """The frames of all calls, without those before the clip's first."""
    state = torch.zeros(len(latents), int(part.inputs[1].dims[1]), *latents.shape[3:])
    found = []
    for piece in latents.split(list(pieces), dim=2):
        with torch.no_grad():
            frames, state = part.module.eval()(piece, state)
        found.append(frames)
    times = int(part.outputs[0].dims[2].rpartition(" ")[2])
    return torch.cat(found, dim=2)[:, :, times - 1 :]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("downsampled", [[False, True, True], [False, False, True]])
def test_pieces_of_any_length_are_the_clip(downsampled: list[bool], pieces: Sequence[int]) -> None:
    model = autoencoder(temperal_downsample=downsampled)
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))
    wanted = by_stock(model, latents)
    found = by_part(wan_decoder_part(model), latents, pieces)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_memory_matters() -> None:
    model = autoencoder()
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))
    other = latents.clone()
    other[:, :, 0] += 1.0
    first, second = (by_part(wan_decoder_part(model), one, PIECES[0]) for one in (latents, other))
    assert (first - second)[:, :, -1].abs().max() > 1e-3


def test_the_autoencoder_of_wan_22_5b_is_refused() -> None:
    model = autoencoder(is_residual=True)
    with pytest.raises(ExportError, match="use the pipeline"):
        wan_decoder_part(model)
