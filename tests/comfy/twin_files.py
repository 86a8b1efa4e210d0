"""The files that the API twins of the example workflows name: models, adapters, VAEs, a picture.

All have random weights; VAEs only have to be what ComfyUI's VAELoader takes.
"""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.recipe import Expert, FewStepRecipe
from fewstep.zoo import entry
from tests.comfy.adapter_files import adapter_file
from tests.comfy.tiny_models import SD3, SD15, WAN
from tests.comfy.tiny_vae import save_random_vae

STRENGTH = 0.3
"""alpha / rank of the adapters: enough to be seen, too little to end in NaN."""
SAME_BETAS = {
    "tiny-dmd2": "dmd2-sdxl-4step-lora",
    "tiny-hyper-cfg": "hyper-sdxl-8steps-cfg-lora",
}
"""Adapter -> the zoo's entry whose recipe it has, for the small SD 1.5 in place of SDXL."""
EXPERTS = ("high_noise", "low_noise")


def make_twin_files(folder: Path) -> None:
    """Write them.

    Args:
        folder: Of a booted ComfyUI's models and input (`Comfy.folder`).
    """
    for model in (SD15, SD3, WAN):
        model.save(folder)
    replace(WAN, name="wan-low").save(folder)
    _make_adapters(folder / "loras")
    save_random_vae(folder, "taesd", 4)
    save_random_vae(folder, "taesd3", 16)
    _make_wan_vae(folder / "vae" / "tiny-wan-vae.safetensors")
    _make_picture(folder / "input" / "example.png")


def expert_recipe() -> FewStepRecipe:
    """Four steps of SD3, two for each of two experts on one network."""
    recipe = SD3.recipe("sd3")
    grid = replace(recipe.grids[0], experts=(0, 0, 1, 1))
    experts = (
        Expert(adapter=EXPERTS[0], sigma_high=1.0, sigma_low=0.875),
        Expert(adapter=EXPERTS[1], sigma_high=0.875, sigma_low=0.0),
    )
    return replace(recipe, grids=(grid,), experts=experts)


def _make_adapters(loras: Path) -> None:
    for seed, (name, source) in enumerate(SAME_BETAS.items()):
        recipe = entry(source).required_recipe()
        recipe = replace(recipe, base=replace(recipe.base, family=SD15.family))
        adapter_file(loras / f"{name}.safetensors", SD15, recipe, seed=seed, scale=STRENGTH)
    for number, name in enumerate(EXPERTS):
        path = loras / f"tiny-sd3-{name.replace('_', '-')}.safetensors"
        said = {"fewstep.phase": name}
        adapter_file(path, SD3, expert_recipe(), seed=number, scale=STRENGTH, metadata=said)
    for name, model, seed in (
        ("tiny-style", SD15, 2),
        ("tiny-wan-high", WAN, 3),
        ("tiny-wan-low", WAN, 4),
    ):
        path = loras / f"{name}.safetensors"
        adapter_file(path, model, None, spelling="comfyui", seed=seed, scale=STRENGTH)


def _make_wan_vae(path: Path) -> None:
    """With values of our own: ComfyUI leaves new networks uninitialised."""
    from comfy.ldm.wan.vae import WanVAE  # pyright: ignore[reportMissingImports]

    network = WanVAE(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    generator = torch.Generator().manual_seed(0)
    values = {
        name: 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in network.state_dict().items()
    }
    save_file(values, path)


def _make_picture(path: Path) -> None:
    """64 pixels square; its transparent left half is what MaskEditor would have painted."""
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGBA")
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 32, 64))
    picture.putalpha(alpha)
    picture.save(path)
