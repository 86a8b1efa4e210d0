"""What people and model managers read in a file's metadata: the `modelspec.*` keys.

Source: Stability AI Model Metadata Standard 1.0.1, github.com/Stability-AI/ModelSpec.
"""

import base64

from fewstep.recipe import FewStepRecipe

ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux": "flux-1",
    "wan": "wan2.1",
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v"}
"""The standard knows only these two; other kinds go without the key."""


def modelspec(
    recipe: FewStepRecipe,
    *,
    title: str,
    description: str,
    data_sha256: str,
    resolution: tuple[int, int] | None,
    date: str | None,
    thumbnail_png: bytes | None,
) -> dict[str, str]:
    """The keys for one adapter; those nobody can fill truthfully are left out.

    Args:
        recipe: How it is sampled.
        title: Name for people.
        description: A sentence or two; may be empty.
        data_sha256: Hex digest of the tensor bytes.
        resolution: (width, height) in px that it was trained at.
        date: ISO 8601, or None to leave it out.
        thumbnail_png: A small picture, PNG bytes.
    """
    family = recipe.base.family
    counts = [f"{grid.num_steps}-step" for grid in recipe.grids]
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{ARCHITECTURES.get(family, family)}/lora",
        "implementation": "diffusers",
        "title": title,
        "description": description,
        "date": date,
        "resolution": f"{resolution[0]}x{resolution[1]}" if resolution else None,
        "hash_sha256": f"0x{data_sha256}",
        "license": recipe.provenance.licence,
        "prediction_type": PREDICTIONS.get(recipe.base.prediction),
        "tags": ", ".join(["few-step", "distilled", *counts]),
        "usage_hint": f"{usage_hint(recipe)}; see fewstep.recipe",
    }
    if thumbnail_png is not None:
        encoded = base64.b64encode(thumbnail_png).decode("ascii")
        entries["thumbnail"] = f"data:image/png;base64,{encoded}"
    return {f"modelspec.{key}": value for key, value in entries.items() if value}


def usage_hint(recipe: FewStepRecipe) -> str:
    """A recipe in a few words: "4 steps, guidance off, Euler"."""
    counts = [str(recipe.default_steps)]
    counts += [str(g.num_steps) for g in recipe.grids if g.num_steps != recipe.default_steps]
    steps = f"{counts[0]} step{'' if counts[0] == '1' else 's'}"
    if recipe.steps == "any":
        steps += " (any count works)"
    elif len(counts) > 1:
        steps += f" (or {', '.join(counts[1:])})"
    return ", ".join([steps, _guidance(recipe), _sampler(recipe)])


def _guidance(recipe: FewStepRecipe) -> str:
    guidance = recipe.guidance
    if guidance.mode == "none":
        return "guidance off"
    name = {"cfg": "guidance", "embedded": "embedded guidance", "true_cfg": "true CFG"}
    return f"{name[guidance.mode]} {guidance.scale:g}"


def _sampler(recipe: FewStepRecipe) -> str:
    sampler = recipe.sampler
    if sampler.kind != "step":
        return {"flow_map": "flow map", "policy": "policy"}[sampler.kind]
    if sampler.stochasticity == 0.0:
        return "DDIM" if recipe.base.schedule.kind == "vp" else "Euler"
    if sampler.stochasticity == 1.0:
        return "LCM (fresh noise each step)"
    return f"TCD gamma {sampler.stochasticity:g}"
