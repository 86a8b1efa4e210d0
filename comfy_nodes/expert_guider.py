"""Guiders that sample a recipe: one network, or one expert per phase of the noise.

`ExpertGuider` keeps one loop and changes what it calls between two steps, so that noise, masks and
samplers know nothing of phases.
"""

from collections.abc import Sequence
from typing import Any, Literal

import comfy.model_management  # pyright: ignore[reportMissingImports]
import comfy.model_patcher  # pyright: ignore[reportMissingImports]
import comfy.sampler_helpers  # pyright: ignore[reportMissingImports]
import comfy.samplers  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from fewstep.comfy_nodes.expert_models import phase_models
from fewstep.comfy_nodes.expert_phases import phase_at, phase_bounds
from fewstep.comfy_nodes.guidance_choice import choose_guidance
from fewstep.comfy_nodes.phase_by_phase_guider import Callback, PhaseByPhaseGuider
from fewstep.comfy_nodes.sampling_limits import check_can_sample
from fewstep.comfy_nodes.sockets import NamedRecipe
from fewstep.recipe import FewStepRecipe

ExpertWay = Literal["one loop", "one run per phase"]
Conditioning = list[Any]
ADDED_BY_SAMPLERS = ("sampler_post_cfg_function", "sampler_pre_cfg_function")


def make_guider(
    model: Any,
    positive: Conditioning,
    negative: Conditioning | None,
    named: NamedRecipe,
    guidance: float | None = None,
    others: Sequence[Any] = (),
    *,
    experts: ExpertWay = "one loop",
) -> comfy.samplers.CFGGuider:
    """A GUIDER that samples a MODEL as a recipe wants it.

    Args:
        model: A MODEL.
        positive: Prompt.
        negative: Negative prompt, needed where guidance is on.
        named: The recipe in force.
        guidance: The user's own scale; None takes the recipe's.
        others: MODELs of further phases, where each has a network of its own.
        experts: How phase experts take turns.

    Raises:
        RecipeError: These nodes do not sample this recipe.
        PipelineError: Guidance needs a negative prompt, or MODELs and phases do not fit.
    """
    recipe = named.recipe
    check_can_sample(recipe)
    choice = choose_guidance(recipe, guidance, has_negative=negative is not None)
    if choice.embedded is not None:
        positive = _told_guidance(positive, choice.embedded)
    models = phase_models(model, others, named)
    if not recipe.experts:
        guider = comfy.samplers.CFGGuider(models[0])
    elif experts == "one loop":
        guider = ExpertGuider(models, recipe)
    else:
        guider = PhaseByPhaseGuider(models, recipe)
    conds = {"positive": positive}
    if negative is not None:
        conds["negative"] = negative
    guider.inner_set_conds(conds)
    guider.set_cfg(choice.cfg)
    return guider


class ExpertGuider(comfy.samplers.CFGGuider):
    """One loop; before a step of another phase, that phase's MODEL takes over.

    Args:
        models: MODEL of each phase, noisiest first: clones of one base, or other networks.
        recipe: With as many experts.
    """

    def __init__(self, models: Sequence[Any], recipe: FewStepRecipe) -> None:
        super().__init__(models[0])
        self._models, self._recipe = tuple(models), recipe
        self._bounds: tuple[float, ...] = ()
        self._active = 0
        self._raw_conds: dict[str, list[dict[str, Any]]] = {}
        self._run: tuple[Any, ...] = ()
        self._options: dict[int, dict[str, Any]] = {}

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        """As `CFGGuider.sample`; begins with the MODEL of the first step's phase."""
        values = [float(sigma) for sigma in sigmas]
        self._bounds = phase_bounds(self._recipe, values)
        self._active = phase_at(self._bounds, values[0]) if values else 0
        self.model_patcher = self._models[self._active]
        self.model_options = self.model_patcher.model_options
        return super().sample(noise, latent_image, sampler, sigmas, *args, **kw)

    def outer_sample(self, *args: Any, **kw: Any) -> Tensor:
        """As `CFGGuider.outer_sample`, with everything as it was afterwards."""
        first, options = self.model_patcher, self.model_options
        self._raw_conds = {name: [c.copy() for c in conds] for name, conds in self.conds.items()}
        self._options = {}
        try:
            return super().outer_sample(*args, **kw)
        finally:
            for phase in self._options:
                self._models[phase].restore_hook_patches()
            self.model_patcher, self.model_options = first, options
            self._raw_conds, self._run, self._options = {}, (), {}

    def inner_sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        device: Any,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None,
        callback: Callback | None,
        disable_pbar: bool,
        seed: int | None,
        **kw: Any,
    ) -> Tensor:
        """As `CFGGuider.inner_sample`; remembers what another network's conditioning is made of."""
        self._run = (noise, latent_image, device, sigmas, denoise_mask, seed, kw)
        return super().inner_sample(
            noise,
            latent_image,
            device,
            sampler,
            sigmas,
            denoise_mask,
            callback,
            disable_pbar,
            seed,
            **kw,
        )

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """x0 at a level, by the phase it belongs to."""
        options = model_options or {}
        phase = phase_at(self._bounds, float(timestep.max()))
        if phase != self._active:
            self._activate(phase)
        if phase in self._options:
            options = self._with_additions(self._options[phase], options)
        return super().predict_noise(x, timestep, options, seed)

    def _activate(self, phase: int) -> None:
        """Let another phase's MODEL take over, in the middle of a run."""
        noise, latent_image, device, sigmas, denoise_mask, seed, kw = self._run
        before, after = self.model_patcher, self._models[phase]
        before.cleanup()
        conds = {name: [c.copy() for c in raw] for name, raw in self._raw_conds.items()}
        if phase not in self._options:
            options = comfy.model_patcher.create_model_options_clone(after.model_options)
            comfy.sampler_helpers.prepare_model_patcher(after, conds, options)
            options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
            self._options[phase] = options
        network, _, loaded = comfy.sampler_helpers.prepare_sampling(
            after, noise.shape, conds, self._options[phase]
        )
        self.loaded_models = [
            *self.loaded_models,
            *(m for m in loaded if m not in self.loaded_models),
        ]
        comfy.samplers.cast_to_load_options(
            self._options[phase], device=device, dtype=after.model_dtype()
        )
        if network is not self.inner_model:
            if latent_image is not None and torch.count_nonzero(latent_image) > 0:
                latent_image = network.process_latent_in(latent_image)
            self.conds = comfy.samplers.process_conds(
                network, noise, conds, device, latent_image, denoise_mask, seed, **kw
            )
            self.inner_model = network
        self.model_patcher, self._active = after, phase
        after.pre_run()

    def _with_additions(self, own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """A phase's own options, with the functions that the sampler added to those of the run."""
        options = dict(own)
        for key in ADDED_BY_SAMPLERS:
            known = self.model_options.get(key, [])
            added = [function for function in given.get(key, []) if function not in known]
            if added:
                options[key] = [*own.get(key, []), *added]
                options["disable_cfg1_optimization"] = given.get("disable_cfg1_optimization", False)
        return options


def _told_guidance(conditioning: Conditioning, scale: float) -> Conditioning:
    """Conditioning with the scale a network is told, as the core node FluxGuidance sets it."""
    return [[entry[0], {**entry[1], "guidance": scale}] for entry in conditioning]
