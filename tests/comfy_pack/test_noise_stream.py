"""The noise of the nodes is the library's stream: the initial draw first, then one per step."""

import pytest
import torch

from fewstep.comfy_nodes.noise_stream import (
    COMFYUI,
    REPRODUCIBLE,
    batch_stream,
    first_noise,
    image_streams,
    streams_of,
)
from fewstep.errors import ConfigError
from fewstep.noise import NoiseBatch

SHAPE = (4, 6, 5)


def test_a_batchs_stream_goes_on_after_comfyuis_noise() -> None:
    like = torch.empty(2, *SHAPE)
    generator = torch.Generator().manual_seed(7)
    initial = torch.randn(like.shape, generator=generator)
    draw = batch_stream(7, initial)
    assert torch.equal(draw(), torch.randn(like.shape, generator=generator))
    assert torch.equal(draw(), torch.randn(like.shape, generator=generator))


def test_every_picture_has_the_librarys_stream() -> None:
    library = NoiseBatch((7, 8, 9))
    latents = torch.empty(3, *SHAPE)
    initial = first_noise(7, latents)
    draw = image_streams()(7, initial)
    for drawn in (initial, draw(), draw()):
        torch.testing.assert_close(drawn, torch.from_numpy(library.draw(SHAPE)), atol=1e-6, rtol=0)


def test_a_picture_taken_from_a_batch_keeps_its_noise() -> None:
    whole = first_noise(7, torch.empty(3, *SHAPE))
    part = first_noise(7, torch.empty(2, *SHAPE), [2, 0])
    assert torch.equal(part, whole[[2, 0]])
    drawn = image_streams([2, 0])(7, part)()
    assert torch.equal(drawn, image_streams()(7, whole)()[[2, 0]])


def test_seeds_wrap() -> None:
    last = first_noise(2**64 - 1, torch.empty(2, *SHAPE))
    assert torch.equal(last[1:], first_noise(0, torch.empty(1, *SHAPE)))


def test_a_batch_index_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 pictures but a batch_index of 2"):
        first_noise(7, torch.empty(3, *SHAPE), [0, 1])


def test_streams_have_names() -> None:
    assert streams_of(REPRODUCIBLE) is batch_stream
    assert streams_of(COMFYUI) is not batch_stream
    with pytest.raises(ConfigError, match="'reproducible \\(CPU\\)' or 'ComfyUI default'"):
        streams_of("other")
