"""A recipe in words: one short line for a node, and a table for people. No ComfyUI here."""

from collections.abc import Sequence
from pathlib import PurePath

from fewstep.comfy_nodes.recipe_limits import beyond_comfyui, family_title
from fewstep.recipe import FewStepRecipe, Grid

MANY = 4
"""Step counts from which they are told as a range."""


def summary(recipe: FewStepRecipe, name: str) -> str:
    """One line: "DMD2 · 4 steps · re-noise · guidance 1.0 · base SDXL".

    Args:
        recipe: How to sample.
        name: What to call it where the recipe does not say how it was made.
    """
    parts = (
        _method(recipe, name),
        _steps(recipe),
        sampler_word(recipe),
        _guidance_short(recipe),
        f"base {family_title(recipe.base.family)}",
    )
    return printable(" · ".join(parts))


def details(
    recipe: FewStepRecipe, name: str, *, model_sigmas: Sequence[float] | None = None
) -> str:
    """A table of plain text: everything a recipe says that a user may want to know.

    Args:
        recipe: How to sample; the grid of its default step count is shown.
        name: What to call it.
        model_sigmas: The same grid in the numbers of the MODEL at hand, N + 1 values.
    """
    grid = recipe.grid()
    rows = [
        ("recipe", name),
        ("steps", _steps(recipe)),
        ("timesteps", _numbers(grid.timesteps)),
        *_row("told", _numbers(grid.clock)),
        ("sigmas", _numbers(grid.sigmas)),
        *_row("in MODEL", _numbers(model_sigmas or ())),
        ("sampler", _sampler(recipe, grid)),
        ("guidance", _guidance(recipe)),
        *(("expert", text) for text in _experts(recipe, grid)),
        *_row("2nd stage", _second_stage(recipe)),
        ("base", _base(recipe)),
        *_row("strength", _strength(recipe)),
        *_row("made by", _made_by(recipe)),
        ("licence", recipe.provenance.licence or "not stated"),
        *_row("source", recipe.provenance.source or ""),
        *(("warning", text) for text in warnings_of(recipe)),
    ]
    return table(rows)


def warnings_of(recipe: FewStepRecipe) -> tuple[str, ...]:
    """What a user of ComfyUI should know before trying; one sentence each."""
    found = []
    if reason := beyond_comfyui(recipe):
        found.append(f"ComfyUI cannot sample this recipe: {reason}")
    if recipe.base.prediction == "x0":
        found.append(
            'the network predicts the picture itself: put "ModelSamplingDiscrete" with "x0" before '
            "the Few-Step nodes"
        )
    return tuple(found)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Rows of a label and a text, aligned; text that came from a file is made harmless."""
    return "\n".join(f"{label:<10}{printable(text)}" for label, text in rows)


def printable(text: str) -> str:
    """On one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def sampler_word(recipe: FewStepRecipe) -> str:
    """How a step is made, in a word or two."""
    sampler, grid = recipe.sampler, recipe.grid()
    if sampler.kind != "step":
        return {"flow_map": "flow map", "policy": "policy"}[sampler.kind]
    if grid.solver:
        return "fitted solver"
    if grid.stops:
        return "ancestral"
    if sampler.stochasticity == 0.0:
        return "DDIM" if recipe.base.schedule.kind == "vp" else "Euler"
    return "re-noise" if sampler.stochasticity == 1.0 else f"TCD gamma {sampler.stochasticity:g}"


def _method(recipe: FewStepRecipe, name: str) -> str:
    """ "DMD2" of "DMD2, 2000 steps": how the weights were made, not how long it took."""
    method = (recipe.provenance.objective or "").partition(",")[0].strip()
    return method or PurePath(name).name.removesuffix(".safetensors")


def _steps(recipe: FewStepRecipe) -> str:
    text = f"{recipe.default_steps} step{'' if recipe.default_steps == 1 else 's'}"
    if recipe.steps == "any":
        return f"{text} (any count)"
    others = [g.num_steps for g in recipe.grids if g.num_steps != recipe.default_steps]
    if len(others) < MANY:
        return f"{text} (or {', '.join(map(str, others))})" if others else text
    counts = [grid.num_steps for grid in recipe.grids]
    return f"{text} ({len(counts)} counts from {counts[0]} to {counts[-1]})"


def _scale(scale: float) -> str:
    return f"{scale:.1f}" if scale == round(scale, 1) else f"{scale:g}"


def _guidance_short(recipe: FewStepRecipe) -> str:
    guidance = recipe.guidance
    kind = {"none": "guidance", "cfg": "guidance", "embedded": "embedded guidance"}
    return f"{kind.get(guidance.mode, 'true CFG')} {_scale(guidance.scale)}"


def _guidance(recipe: FewStepRecipe) -> str:
    guidance = recipe.guidance
    how = {
        "none": "one network call per step",
        "cfg": "two network calls per step",
        "embedded": "told to the network, one call per step",
        "true_cfg": "two network calls per step, beside what the network is told",
    }[guidance.mode]
    works = guidance.negative_prompt == "works"
    negative = "a negative prompt works" if works else "a negative prompt changes nothing"
    return f"{_scale(guidance.scale)} ({how}; {negative})"


def _sampler(recipe: FewStepRecipe, grid: Grid) -> str:
    sampler = recipe.sampler
    word = sampler_word(recipe)
    how = {
        "DDIM": "no fresh noise",
        "Euler": "no fresh noise",
        "re-noise": "fresh noise at every step, as LCM and DMD2",
        "ancestral": "each step goes below its level and fresh noise lifts it up",
        "fitted solver": "weights fitted to these steps, no fresh noise",
    }.get(word, f"stochasticity {sampler.stochasticity:g}")
    notes = [how] if sampler.kind == "step" else []
    if grid.sigmas[0] < 1.0:
        unit = sampler.first_noise == "unit"
        notes.append(f"starts from noise of deviation {1.0 if unit else grid.sigmas[0]:.4g}")
    if sampler.clip_x0 is not None:
        notes.append(f"x0 is clipped to {sampler.clip_x0:g}")
    if sampler.noise_correction:
        notes.append("the first step goes along the noise it started from")
    return f"{word} ({'; '.join(notes)})" if notes else word


def _experts(recipe: FewStepRecipe, grid: Grid) -> list[str]:
    found = []
    for index, expert in enumerate(recipe.experts):
        steps = [str(n + 1) for n, chosen in enumerate(grid.experts) if chosen == index]
        where = f", a network of its own ({expert.component})" if expert.component else ""
        found.append(
            f"{expert.adapter}: step {', '.join(steps) or '-'}, sigma {expert.sigma_high:g} to "
            f"{expert.sigma_low:g}{where}"
        )
    return found


def _second_stage(recipe: FewStepRecipe) -> str:
    stage = recipe.second_stage
    if stage is None:
        return ""
    return f"{stage.grid.num_steps} steps at {stage.upscale:g} times the size, from the result"


def _base(recipe: FewStepRecipe) -> str:
    base = recipe.base
    text = f"{family_title(base.family)}, predicts {base.prediction}"
    if recipe.resolution_shift is not None:
        text += ", sigmas shift with the picture's size"
    return f"{text} ({base.model_id})" if base.model_id else text


def _strength(recipe: FewStepRecipe) -> str:
    scale = recipe.lora.scale
    if scale == 1.0:
        return ""
    return f"{scale:g}: ours is set so by the recipe, core's LoRA loader needs this strength_model"


def _made_by(recipe: FewStepRecipe) -> str:
    given = recipe.provenance
    teacher = f"teacher {given.teacher}" if given.teacher else ""
    scores = ", ".join(f"{k} {v:g}" for k, v in (given.scores or {}).items())
    return "; ".join(text for text in (given.objective, teacher, scores) if text)


def _row(label: str, text: str) -> list[tuple[str, str]]:
    """No row where there is nothing to say."""
    return [(label, text)] if text else []


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
