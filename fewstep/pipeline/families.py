"""Which model family a diffusers pipeline class serves. Knows class names only."""

from fewstep.errors import PipelineError

FAMILIES: dict[str, tuple[str, ...]] = {  # class name starts with -> families it can sample
    "StableDiffusion": ("sd15", "sd2"),
    "StableDiffusion3": ("sd3",),
    "StableDiffusionXL": ("sdxl",),
    "LatentConsistencyModel": ("sd15",),
    "AnimateDiff": ("sd15",),
    "AnimateDiffSDXL": ("sdxl",),
    "Kolors": ("kolors",),
    "PixArt": ("pixart",),
    "Sana": ("sana",),
    "SanaSprint": ("sana-sprint",),
    "Flux": ("flux",),
    "Flux2": ("flux2",),
    "QwenImage": ("qwen-image",),
    "QwenImage21": ("qwen-image-2.1",),
    "Cosmos3": ("cosmos3",),
    "Wan": ("wan",),
    "ZImage": ("z-image",),
    "Krea2": ("krea2",),
    "LTX": ("ltx",),
    "LTX2": ("ltx2",),
    "HunyuanVideo": ("hunyuan-video",),
    "CogVideoX": ("cogvideox",),
}


def longest_prefix(name: str, prefixes: dict[str, object]) -> str | None:
    """The longest key that a name starts with: StableDiffusionXL before StableDiffusion."""
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    return max(fitting, key=len, default=None)


def families_of(class_name: str) -> tuple[str, ...]:
    """Families a pipeline class can sample; empty for a class this table does not know."""
    prefix = longest_prefix(class_name, dict(FAMILIES))
    return FAMILIES[prefix] if prefix is not None else ()


def check_family(class_name: str, family: str) -> None:
    """Refuse a recipe made for another kind of model; unknown classes pass.

    Raises:
        PipelineError: The class serves other families than the recipe's.
    """
    known = families_of(class_name)
    if known and family.lower().replace("_", "-") not in known:
        raise PipelineError(
            f"this recipe is for {family}, but {class_name} samples {' or '.join(known)}; "
            f"use an adapter made for {known[0]}, or a {family} base"
        )
