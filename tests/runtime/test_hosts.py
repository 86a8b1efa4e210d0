"""Every family: the runtime draws FewStepPipeline's picture for the same seed.

Oracle: FewStepPipeline on the same tiny random pipeline. Pixels may differ by one grey level.
"""

import inspect
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe, Guidance, Sampler
from fewstep.runtime.few_step_runtime import FewStepRuntime
from tests.export.tiny_exports import (
    BY_NAME,
    EVERY,
    PROMPTS,
    TinyExport,
    assert_same,
    by_pipeline,
    by_runtime,
    exported,
    named,
    runtime_of,
)
from tests.tiny.parts import stock
from tests.tiny.tasks import EVEN_GRID, FLAGS

RENOISING = Sampler(stochasticity=1.0)


def both(name: str, prompts: list[str], rows: int, columns: int, **changes: Any) -> None:
    """Draw by both and compare."""
    export = BY_NAME[name]
    recipe = export.recipe(**changes)
    size = export.size(rows, columns)
    ours = by_runtime(runtime_of(name, recipe), prompts, size)
    assert_same(ours, by_pipeline(export, recipe, prompts, size))


@EVERY
def test_one_picture_deterministic(name: str) -> None:
    both(name, [PROMPTS[0]], 8, 8)


@EVERY
def test_a_batch_of_prompts_of_different_lengths_renoised(name: str) -> None:
    both(name, [PROMPTS[0], PROMPTS[1]], 4, 8, sampler=RENOISING)


@EVERY
def test_an_odd_aspect_renoised(name: str) -> None:
    both(name, [PROMPTS[1]], 7, 3, sampler=RENOISING)


GUIDED: dict[str, tuple[Any, float]] = {
    "sd15": ("cfg", 3.0),
    "sdxl": ("cfg", 3.0),
    "sd3": ("cfg", 3.0),
    "pixart-sigma": ("cfg", 3.0),
    "sana": ("cfg", 3.0),
    "z-image": ("cfg", 3.0),
    "qwen-image": ("true_cfg", 3.0),
    "flux-schnell": ("true_cfg", 3.0),
    "wan21": ("cfg", 3.0),
    "wan22": ("cfg", 3.0),
}
NO_NEGATIVE = ("sd15", "qwen-image", "flux-schnell", "wan21")


@pytest.mark.parametrize("name", named(*GUIDED))
def test_guidance_away_from_a_negative_prompt(name: str) -> None:
    mode, scale = GUIDED[name]
    guidance = Guidance(mode=mode, scale=scale, negative_prompt="works")
    export = BY_NAME[name]
    recipe, size = export.recipe(guidance=guidance, sampler=RENOISING), export.size(4, 6)
    prompts, negative = [PROMPTS[0], PROMPTS[1]], ["blue dogs", "red"]
    ours = by_runtime(runtime_of(name, recipe), prompts, size, negative_prompt=negative)
    theirs = by_pipeline(export, recipe, prompts, size, negative_prompt=negative)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", named(*NO_NEGATIVE))
def test_guidance_without_a_negative_prompt(name: str) -> None:
    mode, scale = GUIDED[name]
    guidance = Guidance(mode=mode, scale=scale, negative_prompt="works")
    both(name, [PROMPTS[0]], 4, 4, guidance=guidance)


@pytest.mark.parametrize("name", named("lcm", "flux-dev"))
def test_an_embedded_guidance_scale_is_told_to_the_network(name: str) -> None:
    export, size = BY_NAME[name], BY_NAME[name].size(4, 4)
    drawn = {}
    for scale in (2.0, 9.0):
        recipe = export.recipe(guidance=Guidance(mode="embedded", scale=scale))
        drawn[scale] = by_runtime(runtime_of(name, recipe), [PROMPTS[0]], size)
        assert_same(drawn[scale], by_pipeline(export, recipe, [PROMPTS[0]], size))
    assert np.abs(drawn[2.0].latents - drawn[9.0].latents).max() > 1e-3


@EVERY
def test_the_prompt_matters(name: str) -> None:
    """Else equal pictures would say nothing about how prompts are read."""
    runtime = runtime_of(name, BY_NAME[name].recipe())
    found = by_runtime(runtime, list(PROMPTS), BY_NAME[name].size(4, 4), num_images=1)
    same_seed = [by_runtime(runtime, [p], BY_NAME[name].size(4, 4)).latents for p in PROMPTS]
    assert np.abs(same_seed[0] - same_seed[1]).max() > 1e-3
    assert np.abs(same_seed[0] - same_seed[2]).max() > 1e-3
    np.testing.assert_allclose(found.latents[:1], same_seed[0], rtol=1e-4, atol=1e-4)


TASKS = {
    "sd15": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux-dev": "FluxImg2ImgPipeline",
    "qwen-image": "QwenImageImg2ImgPipeline",
    "z-image": "ZImageImg2ImgPipeline",
}


@pytest.mark.parametrize("strength", [0.5, 0.9])
@pytest.mark.parametrize("name", named(*TASKS))
def test_image_to_image(name: str, strength: float) -> None:
    """The autoencoder draws from its distribution first, from each picture's own stream."""
    export, (height, width) = BY_NAME[name], BY_NAME[name].size(4, 6)
    recipe = even_recipe(export, sampler=RENOISING)
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    prompts = [PROMPTS[0], PROMPTS[1]]
    ours = runtime_of(name, recipe)(prompts, seed=7, image=image, strength=strength).pixels
    # one each: given a single picture, some stock pipelines encode it from the first stream alone
    more: Any = {"image": [image] * len(prompts), "strength": strength}
    pipe = image_pipeline(export, TASKS[name], recipe)
    if "height" in inspect.signature(type(pipe).__call__).parameters:
        more |= {"height": height, "width": width}
    found = pipe(prompt=prompts, seed=7, output_type="np", **export.arguments, **more)[0]
    theirs = np.round(found * 255.0).astype(int)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def even_recipe(export: TinyExport, **changes: Any) -> FewStepRecipe:
    """Levels far apart, so that strengths start at different ones."""
    return export.recipe(**({} if export.is_vp else {"timesteps": EVEN_GRID}), **changes)


def image_pipeline(export: TinyExport, task: str, recipe: FewStepRecipe) -> Any:
    """The stock image-to-image pipeline around the same parts, wrapped."""
    kind = getattr(stock, task)
    wanted = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = dict.fromkeys(name for name in wanted if name != "self")
    for name in set(FLAGS) & parts.keys():
        parts[name] = False
    parts |= {name: part for name, part in export.pipeline().components.items() if name in parts}
    pipe = FewStepPipeline.wrap(kind(**parts), recipe=recipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@EVERY
def test_a_folder_is_loaded_and_checked_by_its_path(name: str) -> None:
    loaded = FewStepRuntime.load(exported(name), provider="cpu", has_cache=False, verify=True)
    assert loaded.recipe == BY_NAME[name].recipe()
    size = BY_NAME[name].size(4, 4)
    found = by_runtime(loaded, [PROMPTS[0]], size)
    again = by_runtime(runtime_of(name, loaded.recipe), [PROMPTS[0]], size)
    np.testing.assert_array_equal(found.pixels, again.pixels)
