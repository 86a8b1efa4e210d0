"""Sizes beyond a network's table of places are refused before anything runs."""

from dataclasses import replace

import pytest

from fewstep.errors import RuntimeSettingError
from fewstep.export.families.stable_diffusion_3 import StableDiffusion3
from fewstep.runtime.hosts.host import Parts, Size
from fewstep.runtime.hosts.stable_diffusion_3 import StableDiffusion3Host
from tests.export.tiny_exports import BY_NAME
from tests.runtime.clip_manifest import manifest_of
from tests.runtime.test_clips import nothing
from tests.trainer.backbone_cases import build_sd3


def host(**settings: float) -> StableDiffusion3Host:
    manifest = manifest_of("transformer")
    return StableDiffusion3Host(
        replace(manifest, settings={**manifest.settings, **settings}),
        BY_NAME["sd3"].recipe(),
        Parts(nothing, nothing),
    )


def test_the_largest_side_is_where_the_stock_network_stops() -> None:
    pipe = build_sd3()
    settings = StableDiffusion3().settings(pipe)
    patch, side = int(settings["patch_size"]), settings["largest_side"]
    latents = int(side / settings["vae_scale_factor"])
    table = pipe.transformer.pos_embed
    table.cropped_pos_embed(latents, latents)
    for sides in ((latents + patch, patch), (patch, latents + patch)):
        with pytest.raises(ValueError, match="cannot be greater than `pos_embed_max_size`"):
            table.cropped_pos_embed(*sides)


@pytest.mark.parametrize("size", [(128, 144), (144, 16), (640, 640)])
def test_a_larger_one_is_refused(size: tuple[int, int]) -> None:
    host(largest_side=128.0).check_size(Size(128, 128))
    host().check_size(Size(*size))  # a folder of a network that computes its places
    with pytest.raises(RuntimeSettingError, match=f"{size[0]}x{size[1]} .* at most 128 pixels a"):
        host(largest_side=128.0).check_size(Size(*size))
