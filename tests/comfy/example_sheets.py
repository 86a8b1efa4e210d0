"""The nine example workflows, and what their API twins have instead of real models.

Every public file named here is in fewstep's zoo or in ComfyUI's own templates. What the notes say
is in example_notes/.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.comfy.sheet import ModelFile, Placed, Sheet

NOTES = Path(__file__).parent / "example_notes"
HUB = "https://huggingface.co"
SDXL = ModelFile(
    "checkpoints",
    f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
)
STYLE = ModelFile(
    "loras",
    f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/"
    "sd_xl_offset_example-lora_1.0.safetensors",
)
DMD2 = ModelFile("loras", f"{HUB}/tianweiy/DMD2/resolve/main/dmd2_sdxl_4step_lora_fp16.safetensors")
LIGHTNING = ModelFile(
    "loras", f"{HUB}/ByteDance/SDXL-Lightning/resolve/main/sdxl_lightning_4step_lora.safetensors"
)
HYPER = ModelFile(
    "loras", f"{HUB}/ByteDance/Hyper-SD/resolve/main/Hyper-SDXL-8steps-CFG-lora.safetensors"
)
WAN = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
WAN_HIGH = ModelFile(
    "diffusion_models",
    f"{WAN}/diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
)
WAN_LOW = ModelFile(
    "diffusion_models",
    f"{WAN}/diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
)
WAN_HIGH_LORA = ModelFile(
    "loras", f"{WAN}/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors"
)
WAN_LOW_LORA = ModelFile(
    "loras", f"{WAN}/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors"
)
WAN_VAE = ModelFile("vae", f"{WAN}/vae/wan_2.1_vae.safetensors")
WAN_TEXT = ModelFile(
    "text_encoders",
    f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders/"
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
)

LIGHTHOUSE = (
    "a lighthouse on a basalt cliff at dusk, heavy sea, warm light in the windows, "
    "photograph, 35 mm"
)
PORTRAIT = "portrait of an old fisherman in a yellow raincoat, rain, soft light, photograph"
VIDEO = "a sailing boat crosses a storm, waves break over the bow, handheld camera, film grain"
UNWANTED = "blurry, low contrast, watermark, text"

TEXT = (400, 150)
PICTURE = (380, 400)
EXPERT = (380, 250)
"""Of a loader that also says which phases are there."""
SMALL_PICTURE = (340, 340)

# The twins' files; tests make them. SD 1.5 stands in for SDXL: the same betas, a fifth of the size.
TINY_SDXL = {"model": "tiny-sd15.safetensors", "vae": "taesd"}
TINY_SD3 = {"model": "tiny-sd3.safetensors", "vae": "taesd3"}
TINY_SIZE = {"width": 64, "height": 64}
SDXL_PROMPT = {"tokens": 6, "width": 768, "pooled": 0}
SD3_PROMPT = {"tokens": 6, "width": 128, "pooled": 128}
WAN_PROMPT = {"tokens": 6, "width": 4096, "pooled": 0}


def _checkpoint(sheet: Sheet, tiny: dict[str, str], file: ModelFile | None, name: str) -> Placed:
    files = [file] if file else []
    return sheet.add("CheckpointLoaderSimple", ckpt_name=name, files=files, tiny=tiny)


def _sdxl(sheet: Sheet) -> Placed:
    return _checkpoint(sheet, TINY_SDXL, SDXL, SDXL.name)


def _prompt(sheet: Sheet, clip: Any, text: str, tiny: dict[str, int], **more: Any) -> Placed:
    seed = len(sheet.items)
    return sheet.add(
        "CLIPTextEncode", clip=clip, text=text, size=TEXT, tiny={"seed": seed, **tiny}, **more
    )


def _few_step_lora(sheet: Sheet, model: Any, file: ModelFile, tiny: str, **more: Any) -> Placed:
    return sheet.add(
        "FewStepLoraLoader",
        model=model,
        lora_name=file.name,
        files=[file],
        size=(380, 220),
        tiny={"lora_name": tiny},
        **more,
    )


def _core_lora(sheet: Sheet, model: Any, file: ModelFile, tiny: str, **more: Any) -> Placed:
    return sheet.add(
        "LoraLoaderModelOnly",
        model=model,
        lora_name=file.name,
        files=[file],
        tiny={"lora_name": tiny},
        **more,
    )


def _note(sheet: Sheet, *, height: int = 460) -> None:
    text = (NOTES / f"{sheet.name}.md").read_text(encoding="utf-8")
    sheet.note(text.rstrip(), height=height)


def _picture(sheet: Sheet, samples: Any, vae: Any, name: str, size: Any = PICTURE) -> None:
    image = sheet.add("VAEDecode", samples=samples, vae=vae)
    sheet.add("SaveImage", images=image, filename_prefix=f"few-step/{name}", size=size, title=name)


def _empty(sheet: Sheet, size: int = 1024) -> Placed:
    return sheet.add(
        "EmptyLatentImage", width=size, height=size, batch_size=1, tiny=dict(TINY_SIZE)
    )


def quickstart() -> Sheet:
    """Loader, adapter, sampler."""
    sheet = Sheet("01_few_step_quickstart")
    sheet.column("1 Models", "load")
    base = _sdxl(sheet)
    lora = _few_step_lora(sheet, base, DMD2, "tiny-dmd2.safetensors")
    sheet.column("2 Prompt and size", "prompt")
    prompt = _prompt(sheet, base.out(1), LIGHTHOUSE, SDXL_PROMPT)
    size = _empty(sheet)
    sheet.column("3 Sample", "ours")
    made = sheet.add(
        "FewStepKSampler",
        model=lora,
        positive=prompt,
        latent_image=size,
        seed=7,
        size=(330, 260),
    )
    sheet.column("4 Picture", "result")
    _picture(sheet, made, base.out(2), "quickstart")
    sheet.column("Read me", "stock")
    _note(sheet)
    return sheet


def advanced_sockets() -> Sheet:
    """SAMPLER, SIGMAS and GUIDER of a recipe, and the same by hand."""
    sheet = Sheet("02_advanced_sockets")
    sheet.column("1 Models", "load")
    base = _sdxl(sheet)
    lora = _few_step_lora(sheet, base, HYPER, "tiny-hyper-cfg.safetensors")
    sheet.column("2 Prompts", "prompt")
    positive = _prompt(sheet, base.out(1), PORTRAIT, SDXL_PROMPT, title="Prompt")
    negative = _prompt(sheet, base.out(1), UNWANTED, SDXL_PROMPT, title="Negative prompt")
    size = _empty(sheet)
    noise = sheet.add("RandomNoise", noise_seed=7)
    sheet.column("3 From the recipe", "ours")
    sampling = sheet.add("FewStepSampling", model=lora, size=(360, 330))
    guider = sheet.add("FewStepGuider", model=lora, positive=positive, negative=negative)
    sheet.group("The same by hand", "stock")
    sigmas = sheet.add(
        "FewStepSigmas",
        model=lora,
        values="999, 874, 749, 624, 499, 374, 249, 124",
        kind="timesteps",
        terminal="first training step",
        size=(360, 330),
    )
    sampler = sheet.add("SamplerFewStep", stochasticity=0.0)
    sheet.column("4 Sample", "result")
    run: dict[str, Any] = {"noise": noise, "guider": guider, "latent_image": size}
    made = sheet.add("SamplerCustomAdvanced", sampler=sampling, sigmas=sampling.out(1), **run)
    _picture(sheet, made, base.out(2), "from the recipe", SMALL_PICTURE)
    sheet.group("The same by hand", "stock")
    again = sheet.add("SamplerCustomAdvanced", sampler=sampler, sigmas=sigmas, **run)
    _picture(sheet, again, base.out(2), "by hand", SMALL_PICTURE)
    sheet.column("Look inside", "prompt")
    sheet.add("PreviewAny", source=sampling.out(1), title="The sigmas", size=(400, 180))
    sheet.add("FewStepRecipeInfo", model=lora, recipe=lora.out(1), size=(400, 400))
    sheet.group("Read me", "stock")
    _note(sheet)
    return sheet


def style_lora() -> Sheet:
    """Another LoRA beside the few-step one."""
    sheet = Sheet("03_style_lora_plus_few_step")
    sheet.column("1 Models", "load")
    base = _sdxl(sheet)
    few = _few_step_lora(sheet, base, DMD2, "tiny-dmd2.safetensors")
    styled = _core_lora(
        sheet,
        few,
        STYLE,
        "tiny-style.safetensors",
        strength_model=0.6,
        title="Your style LoRA (core loader)",
    )
    sheet.column("2 Prompt and size", "prompt")
    prompt = _prompt(sheet, base.out(1), LIGHTHOUSE, SDXL_PROMPT)
    size = _empty(sheet)
    sheet.column("3 With the style", "ours")
    common: dict[str, Any] = {"positive": prompt, "latent_image": size, "seed": 7}
    with_style = sheet.add("FewStepKSampler", model=styled, **common)
    sheet.group("Without it", "stock")
    without = sheet.add("FewStepKSampler", model=few, **common)
    sheet.column("4 Pictures", "result")
    _picture(sheet, with_style, base.out(2), "with style", SMALL_PICTURE)
    _picture(sheet, without, base.out(2), "without style", SMALL_PICTURE)
    sheet.column("Read me", "stock")
    _note(sheet)
    return sheet


def from_a_picture() -> Sheet:
    """Image to image, and inpainting."""
    sheet = Sheet("04_img2img_and_inpaint")
    sheet.column("1 Models", "load")
    base = _sdxl(sheet)
    lora = _few_step_lora(sheet, base, DMD2, "tiny-dmd2.safetensors")
    sheet.group("2 Picture and prompt", "prompt")
    picture = sheet.add("LoadImage", image="example.png", size=(380, 330))
    prompt = _prompt(sheet, base.out(1), LIGHTHOUSE, SDXL_PROMPT)
    sheet.column("3 To latents", "prompt")
    scaled = sheet.add(
        "ImageScale",
        image=picture,
        upscale_method="lanczos",
        width=1024,
        height=0,
        crop="disabled",
        tiny={"width": 64},
    )
    latent = sheet.add("VAEEncode", pixels=scaled, vae=base.out(2))
    masked = sheet.add("SetLatentNoiseMask", samples=latent, mask=picture.out(1))
    sheet.column("4 Image to image", "ours")
    changed = sheet.add(
        "FewStepKSampler",
        model=lora,
        positive=prompt,
        latent_image=latent,
        seed=7,
        denoise=0.85,
        size=(330, 290),
    )
    sheet.group("5 Inpaint", "ours")
    painted = sheet.add(
        "FewStepKSampler",
        model=lora,
        positive=prompt,
        latent_image=masked,
        seed=7,
        size=(330, 290),
    )
    sheet.column("6 Pictures", "result")
    _picture(sheet, changed, base.out(2), "image to image", SMALL_PICTURE)
    _picture(sheet, painted, base.out(2), "inpainted", SMALL_PICTURE)
    sheet.column("Read me", "stock")
    _note(sheet)
    return sheet


def two_experts() -> Sheet:
    """Two adapters that take turns on one base."""
    sheet = Sheet("05_two_phase_experts")
    sheet.column("1 Models", "load")
    base = _checkpoint(sheet, TINY_SD3, None, "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors")
    high = sheet.add(
        "FewStepLoraLoader",
        model=base,
        lora_name="my_sd35_high_noise.safetensors",
        size=EXPERT,
        title="Expert of the noisy steps",
        tiny={"lora_name": "tiny-sd3-high-noise.safetensors"},
    )
    both = sheet.add(
        "FewStepLoraLoader",
        model=high,
        lora_name="my_sd35_low_noise.safetensors",
        size=EXPERT,
        title="Expert of the clean steps",
        tiny={"lora_name": "tiny-sd3-low-noise.safetensors"},
    )
    sheet.column("2 Prompt and size", "prompt")
    prompt = _prompt(sheet, base.out(1), PORTRAIT, SD3_PROMPT)
    size = sheet.add("EmptySD3LatentImage", width=1024, height=1024, tiny=dict(TINY_SIZE))
    sheet.add("FewStepRecipeInfo", model=both, size=(400, 390), title="Who serves which step")
    sheet.column("3 Sample", "ours")
    made = sheet.add(
        "FewStepKSampler", model=both, positive=prompt, latent_image=size, seed=7, size=(330, 260)
    )
    sheet.column("4 Picture", "result")
    _picture(sheet, made, base.out(2), "two experts")
    sheet.column("Read me", "stock")
    _note(sheet)
    return sheet


def wan_experts() -> Sheet:
    """Wan 2.2: two networks, each with its adapter."""
    sheet = Sheet("06_wan22_high_low_experts")
    sheet.column("1 High noise", "load")
    high = sheet.add(
        "UNETLoader",
        unet_name=WAN_HIGH.name,
        files=[WAN_HIGH],
        size=(430, 82),
        tiny={"unet_name": "tiny-wan.safetensors"},
    )
    high = _core_lora(sheet, high, WAN_HIGH_LORA, "tiny-wan-high.safetensors")
    sheet.group("Low noise", "load")
    low = sheet.add(
        "UNETLoader",
        unet_name=WAN_LOW.name,
        files=[WAN_LOW],
        tiny={"unet_name": "tiny-wan-low.safetensors"},
    )
    low = _core_lora(sheet, low, WAN_LOW_LORA, "tiny-wan-low.safetensors")
    sheet.group("Text encoder and VAE", "load")
    clip = sheet.add("CLIPLoader", clip_name=WAN_TEXT.name, type="wan", files=[WAN_TEXT])
    vae = sheet.add(
        "VAELoader",
        vae_name=WAN_VAE.name,
        files=[WAN_VAE],
        tiny={"vae_name": "tiny-wan-vae.safetensors"},
    )
    sheet.column("2 Prompt and size", "prompt")
    prompt = _prompt(sheet, clip, VIDEO, WAN_PROMPT)
    size = sheet.add(
        "EmptyHunyuanLatentVideo",
        width=832,
        height=480,
        length=81,
        tiny={**TINY_SIZE, "length": 5},
    )
    noise = sheet.add("RandomNoise", noise_seed=7)
    sheet.column("3 One recipe, two networks", "ours")
    recipe = sheet.add("FewStepRecipe", preset="Wan · wan2.2-lightning-t2v-a14b", size=(360, 480))
    guider = sheet.add(
        "FewStepGuider",
        model=high,
        model_2=low,
        positive=prompt,
        recipe=recipe,
        size=(360, 215),
    )
    sampling = sheet.add("FewStepSampling", model=high, recipe=recipe, size=(360, 270))
    sheet.column("4 Video", "result")
    made = sheet.add(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampling,
        sigmas=sampling.out(1),
        latent_image=size,
    )
    frames = sheet.add("VAEDecode", samples=made, vae=vae)
    video = sheet.add("CreateVideo", images=frames, fps=16.0, size=(380, 115))
    sheet.add(
        "SaveVideo", video=video, filename_prefix="few-step/wan22", size=PICTURE, title="wan22"
    )
    sheet.column("Read me", "stock")
    _note(sheet, height=620)
    return sheet


def existing_lora() -> Sheet:
    """A public LoRA in the core loader, sampled by its preset."""
    sheet = Sheet("07_existing_lora_with_preset")
    sheet.column("1 Models", "load")
    base = _sdxl(sheet)
    lora = _core_lora(sheet, base, LIGHTNING, "tiny-style.safetensors")
    sheet.column("2 Prompt and size", "prompt")
    prompt = _prompt(sheet, base.out(1), PORTRAIT, SDXL_PROMPT)
    size = _empty(sheet)
    sheet.column("3 Recipe of the LoRA", "ours")
    recipe = sheet.add("FewStepRecipe", preset="SDXL · sdxl-lightning-4step-lora", size=(360, 480))
    sheet.add("FewStepRecipeInfo", recipe=recipe, model=lora, size=(360, 400))
    sheet.column("4 Sample", "ours")
    made = sheet.add(
        "FewStepKSampler",
        model=lora,
        positive=prompt,
        latent_image=size,
        recipe=recipe,
        seed=7,
        size=(330, 260),
    )
    sheet.column("5 Picture", "result")
    _picture(sheet, made, base.out(2), "preset")
    sheet.column("Read me", "stock")
    _note(sheet, height=520)
    return sheet


def stock_nodes() -> Sheet:
    """What the recipe replaces: the same picture with core nodes alone."""
    sheet = Sheet("08_stock_nodes_only")
    sheet.column("1 Models", "load")
    base = _sdxl(sheet)
    lora = _core_lora(sheet, base, LIGHTNING, "tiny-style.safetensors")
    sheet.column("2 Prompt and size", "prompt")
    prompt = _prompt(sheet, base.out(1), PORTRAIT, SDXL_PROMPT)
    size = _empty(sheet)
    sheet.column("3 What you have to know", "stock")
    noise = sheet.add("RandomNoise", noise_seed=7)
    guider = sheet.add("BasicGuider", model=lora, conditioning=prompt, title="Guidance: none")
    sampler = sheet.add("KSamplerSelect", sampler_name="euler", title="Sampler: euler")
    sigmas = sheet.add(
        "ManualSigmas",
        sigmas="14.6144, 4.08173, 1.61289, 0.693205, 0",
        title="Sigmas of timesteps 999, 749, 499, 249",
    )
    sheet.column("4 Sample", "stock")
    made = sheet.add(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=size,
    )
    sheet.column("5 Picture", "result")
    _picture(sheet, made, base.out(2), "stock nodes")
    sheet.column("Read me", "stock")
    _note(sheet, height=480)
    return sheet


def right_and_wrong() -> Sheet:
    """One seed, three ways to sample it."""
    sheet = Sheet("09_right_and_wrong")
    sheet.column("1 Models", "load")
    base = _sdxl(sheet)
    lora = _few_step_lora(sheet, base, DMD2, "tiny-dmd2.safetensors")
    sheet.group("2 Prompts and size", "prompt")
    prompt = _prompt(sheet, base.out(1), LIGHTHOUSE, SDXL_PROMPT, title="Prompt")
    negative = _prompt(sheet, base.out(1), UNWANTED, SDXL_PROMPT, title="Negative prompt")
    size = _empty(sheet)
    sheet.column("Right: the recipe", "ours")
    right = sheet.add("FewStepKSampler", model=lora, positive=prompt, latent_image=size, seed=7)
    sheet.group("Wrong: the usual scheduler", "wrong")
    stock: dict[str, Any] = {
        "model": lora,
        "positive": prompt,
        "negative": negative,
        "latent_image": size,
        "seed": 7,
        "steps": 4,
    }
    schedule = sheet.add("KSampler", cfg=1.0, sampler_name="euler", scheduler="normal", **stock)
    sheet.group("Wrong: the usual guidance", "wrong")
    guidance = sheet.add("KSampler", cfg=7.0, sampler_name="lcm", scheduler="simple", **stock)
    sheet.column("Pictures", "result")
    _picture(sheet, right, base.out(2), "recipe", SMALL_PICTURE)
    sheet.column("Wrong pictures", "result")
    _picture(sheet, schedule, base.out(2), "wrong scheduler", SMALL_PICTURE)
    _picture(sheet, guidance, base.out(2), "wrong guidance", SMALL_PICTURE)
    sheet.column("Read me", "stock")
    _note(sheet)
    return sheet


ALL_SHEETS: tuple[Callable[[], Sheet], ...] = (
    quickstart,
    advanced_sockets,
    style_lora,
    from_a_picture,
    two_experts,
    wan_experts,
    existing_lora,
    stock_nodes,
    right_and_wrong,
)
