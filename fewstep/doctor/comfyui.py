"""A recipe in ComfyUI's stock nodes: what to type where, and what those nodes cannot do. No torch.

Facts of ComfyUI 0.8: samples of epsilon and v models are x0 + s * noise with s = sigma / alpha,
those of flow models (1 - sigma) * x0 + sigma * noise; timesteps follow from sigmas; LoRA metadata
is not read; a LoRA key that is not known is a line on the console.
"""

from itertools import pairwise

from fewstep.adapters.names import TensorName
from fewstep.doctor.consumers import ComfySettings, RuntimeLevel
from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import AdapterFile, Check, Subject
from fewstep.noise_schedule import Flow, shift_sigma
from fewstep.recipe import FewStepRecipe, Grid
from fewstep.zoo.matching import UNETS

SAME = 1e-3
"""Sigmas of a stock scheduler this near to the recipe's are the recipe's."""
LEAST_SIGNAL = 4.8973451890853435e-08
"""alpha squared where a schedule ends without any signal: ComfyUI's own number for that (zsnr)."""
SHIFT_NODES = {  # family -> the node that sets the shift
    "flux": "ModelSamplingFlux",
    "z-image": "ModelSamplingAuraFlow",
    "qwen-image": "ModelSamplingAuraFlow",
    "aura-flow": "ModelSamplingAuraFlow",
}
GUIDED = ("flux", "flux2", "hunyuan-video", "hunyuan-image")
"""Families to whose networks FluxGuidance tells the guidance."""
NOT_LOADED: dict[str, tuple[str, ...]] = {  # family -> dialects of which core loads little or none
    "sd15": ("diffusers/PEFT", "PEFT", "bare"),
    "sd2": ("diffusers/PEFT", "PEFT", "bare"),
    "sdxl": ("diffusers/PEFT", "PEFT", "bare"),
    "sd3": ("bare",),
    "pixart": ("bare",),
    "wan": ("diffusers/PEFT", "bare"),
    "ltx": ("diffusers/PEFT", "bare"),
    "hunyuan-video": ("diffusers/PEFT", "bare"),
}


def comfy_settings(recipe: FewStepRecipe, grid: Grid, *, weight: float) -> ComfySettings:
    """How to sample a recipe in ComfyUI.

    Args:
        recipe: The recipe.
        grid: One of its grids.
        weight: What the LoRA's alpha / rank is multiplied with.
    """
    sigmas = comfy_sigmas(recipe, grid)
    sampler = _sampler_name(recipe, grid)
    scheduler = "simple" if _is_simple(recipe, sigmas) else None
    cfg = recipe.guidance.scale if recipe.guidance.mode in ("cfg", "true_cfg") else 1.0
    nodes = [f"LoraLoaderModelOnly: strength_model {weight:g}"]
    shift = recipe.base.schedule.shift
    if recipe.base.schedule.kind == "flow" and shift is not None:
        node = SHIFT_NODES.get(recipe.base.family, "ModelSamplingSD3")
        if node != "ModelSamplingFlux":  # there the shift comes from the size
            nodes.append(f"{node}: shift {shift:g}")
    if scheduler is not None:
        nodes.append(f"BasicScheduler: {scheduler}, steps {grid.num_steps}, denoise 1.0")
    nodes.append(f"ManualSigmas: {sigmas_text(sigmas)}" + (" (the same)" if scheduler else ""))
    nodes.append(f"KSamplerSelect: {sampler or 'none fits'}")
    if recipe.guidance.mode == "embedded" and recipe.base.family in GUIDED:
        nodes.append(f"FluxGuidance: guidance {recipe.guidance.scale:g}")
    nodes.append(f"CFGGuider: cfg {cfg:g}, then SamplerCustomAdvanced")
    return ComfySettings(sampler, scheduler, cfg, sigmas, tuple(nodes), _notes(recipe, grid))


def comfy_sigmas(recipe: FewStepRecipe, grid: Grid) -> tuple[float, ...]:
    """A grid's sigmas in ComfyUI's convention, N + 1 values, the terminal last."""
    if recipe.base.schedule.kind == "flow":
        return grid.sigmas
    return tuple(sigma / max(1.0 - sigma * sigma, LEAST_SIGNAL) ** 0.5 for sigma in grid.sigmas)


def sigmas_text(sigmas: tuple[float, ...]) -> str:
    """For ManualSigmas, which reads no exponents: 1e-05 would become 1 and -5."""
    return ", ".join(f"{sigma:.6f}".rstrip("0").rstrip(".") or "0" for sigma in sigmas)


def runtime_levels(recipe: FewStepRecipe, num_steps: int) -> tuple[RuntimeLevel, ...]:
    """The N + 1 levels a host without torch steps through, clock included."""
    grid = recipe.grid(num_steps)
    told = (*(grid.clock or grid.timesteps), None)
    return tuple(
        RuntimeLevel(level.timestep if t is None else t, level.alpha, level.sigma)
        for t, level in zip(told, recipe.levels(num_steps), strict=True)
    )


class KeysNotLoaded(Check):
    """Names that core ComfyUI passes over."""

    def examine(self, subject: Subject) -> Finding | None:
        for file in subject.files:
            names = [m.name for m in file.modules if not m.name.is_text_encoder]
            lost = [name for name in names if _is_passed_over(name, file)]
            if lost:
                left = "no LoRA" if len(lost) == len(names) else "only a part of the LoRA"
                return Finding(
                    "comfyui/keys-not-loaded",
                    "warning",
                    f"core ComfyUI passes over {file.family} LoRA names of the kind "
                    f"{lost[0].dialect} ({len(lost)} of {len(names)} modules): a picture with "
                    f"{left}",
                    "fewstep convert IN OUT --format comfyui",
                    {"dialect": lost[0].dialect, "modules": len(lost)},
                )
        return None


def _is_passed_over(name: TensorName, file: AdapterFile) -> bool:
    if name.dialect not in NOT_LOADED.get(file.family or "", ()):
        return False
    if file.family not in UNETS or name.dialect == "PEFT":
        return True
    # Of UNets it knows the names of old attention processors, `processor.to_q_lora`, and so
    # diffusers' names of everything that is not an attention's to_q, to_k, to_v, to_out.
    is_old = any(".processor." in tensor for tensor in file.header.tensors)
    return ".to_" in name.module and not is_old


class AlphaLost(Check):
    """An alpha that only metadata tells."""

    def examine(self, subject: Subject) -> Finding | None:
        for file in subject.files:
            off = [m for m in file.modules if m.alpha is not None and m.alpha != m.rank]
            if file.has_alpha_tensors or not off:
                continue
            right = (off[0].alpha or 0.0) / off[0].rank
            weight = ""
            if len(_scales(file)) == 1:
                weight = f", or strength_model {right * file.scale:g}"
            return Finding(
                "comfyui/alpha-lost",
                "warning",
                f"alpha is only in the metadata, which ComfyUI does not read: it applies "
                f"{len(off)} modules with 1 in place of alpha / rank = {right:g}",
                f"fewstep convert IN OUT --format comfyui{weight}",
                {"modules": len(off), "scale": right},
            )
        return None


class NoSampler(Check):
    """Recipes beyond core ComfyUI's samplers."""

    def examine(self, subject: Subject) -> Finding | None:
        recipe, grid = subject.recipe, subject.grid
        if recipe is None or grid is None:
            return None
        notes = _notes(recipe, grid)
        if not notes or _sampler_name(recipe, grid) is not None:
            return None
        return Finding(
            "comfyui/no-sampler",
            "note",
            f"core ComfyUI has no sampler for this recipe: {notes[0]}",
            "sample it with FewStepPipeline",
        )


COMFYUI_CHECKS: tuple[Check, ...] = (KeysNotLoaded(), AlphaLost(), NoSampler())


def lora_weight(recipe: FewStepRecipe, file: AdapterFile | None) -> float:
    """strength_model in ComfyUI: the weight, and the alpha / rank that it cannot read."""
    if file is None:
        return recipe.lora.scale
    scales = _scales(file)
    if file.has_alpha_tensors or len(scales) != 1:
        return file.scale
    return file.scale * scales.pop()


def _scales(file: AdapterFile) -> set[float]:
    return {1.0 if m.alpha is None else m.alpha / m.rank for m in file.modules}


def _sampler_name(recipe: FewStepRecipe, grid: Grid) -> str | None:
    plain = recipe.sampler.kind == "step" and not (grid.clock or grid.sizes or grid.solver)
    if not plain or recipe.sampler.clip_x0 is not None or recipe.sampler.noise_correction:
        return None
    if recipe.base.schedule.kind == "trigflow" or _is_guidance_lost(recipe):
        return None
    if grid.stops:
        return "euler_ancestral" if _is_ancestral(recipe, grid) else None
    return {0.0: "euler", 1.0: "lcm"}.get(recipe.sampler.stochasticity)


def _notes(recipe: FewStepRecipe, grid: Grid) -> tuple[str, ...]:
    sampler = recipe.sampler
    reasons = {
        f"it is of the kind {sampler.kind}": sampler.kind != "step",
        f"its stochasticity {sampler.stochasticity:g} is TCD's gamma, which core has no sampler "
        "for": 0.0 < sampler.stochasticity < 1.0,
        "the network is told other timesteps than its sigmas have": bool(grid.clock),
        "its samples grow from step to step": bool(grid.sizes),
        "its steps have fitted weights": bool(grid.solver),
        "it clips clean data": sampler.clip_x0 is not None,
        "it corrects the first noise": sampler.noise_correction,
        "its steps stop early, and not as euler_ancestral does": bool(grid.stops)
        and not _is_ancestral(recipe, grid),
        "its guidance is a number for the network, which core has no node for": _is_guidance_lost(
            recipe
        ),
        "its schedule is TrigFlow": recipe.base.schedule.kind == "trigflow",
        "its experts need one sampler each (SplitSigmas)": bool(recipe.experts),
        "its sigmas depend on the size; these are before the shift": recipe.resolution_shift
        is not None,
    }
    if sampler.stochasticity == 1.0:
        reasons["'lcm' draws its noise on the device: other pictures than here per seed"] = True
    return tuple(reason for reason, holds in reasons.items() if holds)


def _is_guidance_lost(recipe: FewStepRecipe) -> bool:
    return recipe.guidance.mode == "embedded" and recipe.base.family not in GUIDED


def _is_ancestral(recipe: FewStepRecipe, grid: Grid) -> bool:
    """Whether each step goes down to sigma_next^2 / sigma, as euler_ancestral does with eta 1."""
    if recipe.base.schedule.kind == "flow":
        return False
    sigmas = comfy_sigmas(recipe, grid)
    stops = (stop / max(1.0 - stop * stop, LEAST_SIGNAL) ** 0.5 for stop in grid.stops)
    downs = (after * after / before for before, after in pairwise(sigmas))
    return all(abs(a - b) <= SAME * max(b, SAME) for a, b in zip(stops, downs, strict=True))


def _is_simple(recipe: FewStepRecipe, sigmas: tuple[float, ...]) -> bool:
    """Whether BasicScheduler "simple" gives these sigmas: every 1000/N-th of the model's table."""
    count = len(sigmas) - 1
    schedule = recipe.base.schedule.build()
    if recipe.resolution_shift is not None or sigmas[-1] != 0.0:
        return False
    total = recipe.base.schedule.num_train_timesteps
    picked = [total - 1 - int(i * total / count) for i in range(count)]
    if isinstance(schedule, Flow):
        stock = [shift_sigma((t + 1) / total, schedule.shift) for t in picked]
    elif recipe.base.schedule.kind == "vp":
        vp = (schedule.sigma_of_timestep(float(t)) for t in picked)
        stock = [s / (1.0 - s * s) ** 0.5 for s in vp]
    else:
        return False
    return all(abs(a - b) <= SAME * max(b, SAME) for a, b in zip(stock, sigmas, strict=False))
