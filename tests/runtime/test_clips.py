"""Clips: what is refused, how prompts are cleaned, and what a file holds.

That the frames are FewStepPipeline's is tested for every family in test_hosts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image

from fewstep.cli.picture_folder import PictureFolder
from fewstep.errors import RuntimeSettingError
from fewstep.recipe import FewStepRecipe
from fewstep.runtime.clips import DESCRIPTION
from fewstep.runtime.hosts.host import Parts, Size
from fewstep.runtime.hosts.stable_diffusion_3 import StableDiffusion3Host
from fewstep.runtime.hosts.wan import WanHost, cleaned
from fewstep.runtime.output import RuntimeOutput
from fewstep.runtime.request import StepEvent
from tests.export.tiny_exports import BY_NAME, FRAMES, runtime_of
from tests.runtime.clip_manifest import manifest_of


def nothing(name: str) -> Any:
    raise AssertionError(f"{name} is not needed")


def recipe() -> FewStepRecipe:
    return BY_NAME["wan21"].recipe()


def host() -> WanHost:
    return WanHost(manifest_of("transformer"), recipe(), Parts(nothing, nothing))


def test_the_first_latent_frame_is_one_picture() -> None:
    found = host()
    assert found.default_size == Size(480, 832, 81)
    shapes = {n: found.latent_shape(Size(64, 96, n)) for n in (1, 5, 81)}
    assert shapes == {1: (4, 1, 8, 12), 5: (4, 2, 8, 12), 81: (4, 21, 8, 12)}


@pytest.mark.parametrize(("frames", "nearest"), [(0, 1), (-3, 1), (8, 9), (80, 81), (2, 1)])
def test_counts_that_no_clip_has_are_refused(frames: int, nearest: int) -> None:
    with pytest.raises(RuntimeSettingError, match=f"frames is {frames}.* nearest is {nearest}$"):
        host().check_size(Size(64, 96, frames))


def test_sides_are_checked_as_those_of_pictures() -> None:
    with pytest.raises(RuntimeSettingError, match=r"multiples of 16; the nearest is 64x96"):
        host().check_size(Size(65, 96, 9))


def test_frames_are_refused_where_pictures_are_made() -> None:
    pictures = StableDiffusion3Host(manifest_of("transformer"), recipe(), Parts(nothing, nothing))
    with pytest.raises(RuntimeSettingError, match="leave frames out"):
        pictures.check_size(Size(64, 96, 9))


def test_two_networks_without_experts_are_refused() -> None:
    both = ("transformer", "transformer_2")
    with pytest.raises(RuntimeSettingError, match="which steps are whose"):
        WanHost(manifest_of(*both), recipe(), Parts(nothing, nothing))
    found = WanHost(manifest_of(*both, experts=both), recipe(), Parts(nothing, nothing))
    assert found.denoisers == both


def test_a_picture_to_start_from_is_refused() -> None:
    with pytest.raises(RuntimeSettingError, match="text alone"):
        host().encode_image(np.zeros((1, 3, 8, 8), np.float32), nothing)


@pytest.mark.parametrize(
    "prompt", ["", "  a \n\t red  cat ", "a &amp;amp; b", "&nbsp;x", "x &#32; "]
)
def test_prompts_are_cleaned_as_stock_cleans_them(prompt: str) -> None:
    assert cleaned(prompt) == prompt_clean(prompt)


def clips() -> RuntimeOutput:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 24, 3), np.uint8)
    return RuntimeOutput(pixels, (3, 4), 16.0)


def in_file(path: Path) -> tuple[np.ndarray, list[int]]:
    """Pictures, and for how many milliseconds each is shown."""
    pixels, durations = [], []
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            pixels.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(pixels), durations


def test_a_file_holds_the_clip_without_loss(tmp_path: Path) -> None:
    clips().save(tmp_path / "clip.webp", 1)
    pixels, durations = in_file(tmp_path / "clip.webp")
    np.testing.assert_array_equal(pixels, clips().pixels[1])
    assert durations == [62] * 5


def test_a_clip_needs_a_name_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeSettingError, match=r"ending in \.webp"):
        clips().save(tmp_path / "clip.png")
    assert list(tmp_path.iterdir()) == []


def test_clips_are_no_pictures() -> None:
    found = clips()
    assert [[image.size for image in clip] for clip in found.frames] == [[(24, 16)] * 5] * 2
    with pytest.raises(RuntimeSettingError, match="take frames, or save"):
        _ = found.images
    still = RuntimeOutput(found.pixels[:, 0], found.seeds)
    assert [len(clip) for clip in still.frames] == [1, 1]
    assert len(still.images) == 2


def test_clips_and_pictures_are_numbered_together(tmp_path: Path) -> None:
    folder, facts = PictureFolder(tmp_path, "{}"), {"prompt": "x", "seed": 3}
    folder.save_clip(clips().frames[0], 16.0, facts)
    folder = PictureFolder(tmp_path, "{}")
    folder.save(clips().frames[0][0], facts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000-seed3.webp", "0001-seed3.png"]
    with Image.open(tmp_path / "0000-seed3.webp") as image:
        assert '"prompt": "x"' in image.getexif()[DESCRIPTION]


@pytest.mark.slow
def test_a_preview_is_the_clips_first_picture() -> None:
    export, seen = BY_NAME["wan21"], list[StepEvent]()
    found = runtime_of("wan21", export.recipe())(
        "a red cat", seed=7, size=export.size(4, 6), frames=FRAMES, callback=seen.append
    )
    (shown,) = seen[-1].preview()
    np.testing.assert_array_equal(np.asarray(shown), found.pixels[0, 0])


@pytest.mark.slow
def test_clips_drawn_together_are_those_drawn_alone() -> None:
    export = BY_NAME["wan22"]
    drawn, size = runtime_of("wan22", export.recipe()), export.size(4, 6)
    both = drawn(["a red cat", "two dogs"], seed=7, size=size, frames=FRAMES).pixels
    alone = drawn("two dogs", seed=8, size=size, frames=FRAMES).pixels
    assert np.abs(both[1:].astype(int) - alone).max() <= 1
