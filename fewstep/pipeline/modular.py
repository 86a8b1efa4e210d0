"""Few-step sampling in diffusers' modular pipelines (0.42: SDXL, FLUX, Qwen-Image, Wan, ...).

    pipe = ModularPipeline.from_pretrained(repo); pipe.load_components()
    pipe = FewStepModularPipeline.wrap(pipe, adapter="adapter.safetensors")
    image = pipe(prompt="a handwritten seven", seed=1, output="images")[0]

The pipeline stays what it was, blocks and components included; its scheduler and its guider follow
the recipe. What a modular pipeline leaves no place for is refused in a sentence: a first noise
that must be scaled (its blocks draw it), growing samples, inserted strengths.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from diffusers import ClassifierFreeGuidance, ModularPipeline

from fewstep.errors import PipelineError
from fewstep.pipeline.call_arguments import refuse_own_grid, seeded_generators
from fewstep.pipeline.config_recipes import recipe_of_pipeline
from fewstep.pipeline.experts.files import AdapterSource, check_no_file_is_needed, find_files
from fewstep.pipeline.experts.networks import (
    BOUNDARY,
    check_counts,
    check_networks,
    has_own_networks,
    install_boundary,
)
from fewstep.pipeline.experts.policies import POLICIES, check_policy
from fewstep.pipeline.experts.switch import ExpertSwitch
from fewstep.pipeline.families import check_family
from fewstep.pipeline.kinds_fit import check_kinds
from fewstep.pipeline.wrapping import read_all, resolve
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_resolution import ResolvedRecipe
from fewstep.schedulers import FewStepScheduler
from fewstep.start_rules import snap_start

NEGATIVES = {
    "negative_prompt_embeds": "prompt_embeds",
    "negative_prompt_embeds_mask": "prompt_embeds_mask",
    "negative_pooled_prompt_embeds": "pooled_prompt_embeds",
}
"""Inputs some blocks demand although nothing reads them without guidance."""
GUIDERS = ("guider", "guider_2")  # Wan 2.2 has one for each network
IMAGES = ("image", "image_latents")
USER = 3
"""Stack depth of whoever called the pipeline, for warnings."""


class FewStepModularPipeline(ModularPipeline):
    """A modular pipeline under a recipe; made by `wrap`, never directly."""

    _fewstep: ResolvedRecipe
    _fewstep_before: dict[str, Any]
    _fewstep_experts: ExpertSwitch | None
    _fewstep_steps: int
    _fewstep_boundary: float | None

    @staticmethod
    def wrap(
        pipe: ModularPipeline,
        *,
        recipe: FewStepRecipe | str | Path | None = None,
        adapter: AdapterSource | None = None,
        steps: int | None = None,
        adapter_scale: float | None = None,
        experts: str = "adapters",
    ) -> "FewStepModularPipeline":
        """Put a modular pipeline, its components loaded, under a recipe, in place.

        Args: As `FewStepPipeline.wrap`.

        Raises:
            PipelineError: The recipe is for another kind of model, or needs what blocks cannot do.
            AdapterError: The adapter does not fit.
            RecipeNotFoundError: Nothing says how to sample.
        """
        if isinstance(pipe, FewStepModularPipeline):
            raise PipelineError("this pipeline is already wrapped; unwrap() it first")
        files = () if adapter is None else find_files(adapter)
        resolved = resolve(recipe, files, None, None, lambda: recipe_of_pipeline(pipe))
        found = resolved.recipe
        policy = check_policy(experts)
        num_steps = found.grid(steps).num_steps
        check_family(type(pipe).__name__, found.base.family)
        like: Any = pipe  # it has the components that a classic pipeline has
        _check_blocks_can(pipe, found)
        check_networks(like, found)
        scheduler, switch = FewStepScheduler(found), None
        changed = {"scheduler": scheduler, **_guiders(pipe, found)}
        check_kinds(found, files)
        if files:  # last of all that may fail
            scale = found.lora.scale if adapter_scale is None else adapter_scale
            switch = POLICIES[policy](like, read_all(like, found, files, scale))
            scheduler.before_call = switch.before_call if found.experts else None
        elif adapter_scale is not None:
            raise PipelineError("adapter_scale was passed without an adapter; pass adapter= too")
        elif found.experts:
            check_no_file_is_needed(found)
        wrapped: Any = pipe
        wrapped._fewstep_before = {name: pipe.components[name] for name in changed}
        wrapped._fewstep, wrapped._fewstep_experts = resolved, switch
        wrapped._fewstep_steps = num_steps
        own = has_own_networks(found)
        wrapped._fewstep_boundary = install_boundary(like, found) if own else None
        pipe.update_components(**changed)
        wrapped.__class__ = _few_step_modular_class(type(pipe))
        return wrapped

    def unwrap(self) -> ModularPipeline:
        """Give the modular pipeline back, in place: class, scheduler, guider, adapter removed."""
        if self._fewstep_experts is not None:
            like: Any = self
            self._fewstep_experts.remove(like)
        if has_own_networks(self.recipe):
            self.register_to_config(**{BOUNDARY: self._fewstep_boundary})
        self.update_components(**self._fewstep_before)
        for name in FewStepModularPipeline.__annotations__:
            delattr(self, name)
        self.__class__ = type(self).__mro__[2]
        return self

    @property
    def recipe(self) -> FewStepRecipe:
        """The recipe in force."""
        return self._fewstep.recipe

    def __call__(
        self,
        state: Any = None,
        output: str | list[str] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        **inputs: Any,
    ) -> Any:
        """The modular call, with steps, guidance and strength of the recipe, and `seed`.

        Raises:
            PipelineError: A grid of the caller's own, or seed and generator together.
            RecipeError: The model was not made for the step count asked for.
        """
        scheduler = self.components["scheduler"]
        if not isinstance(scheduler, FewStepScheduler):
            raise PipelineError(
                f"the scheduler was replaced by {type(scheduler).__name__}, which does not know "
                "the recipe; unwrap() the pipeline to sample it freely"
            )
        known = set(self.blocks.input_names)
        arguments = _fill(self.recipe, self._fewstep_steps, known, inputs, seed)
        self._prepare(arguments["num_inference_steps"])
        scheduler.set_timesteps(arguments["num_inference_steps"])
        if "strength" in known and any(arguments.get(name) is not None for name in IMAGES):
            default = next(i.default for i in self.blocks.inputs if i.name == "strength")
            arguments.setdefault("strength", default)
        if arguments.get("strength") is not None:
            arguments["strength"] = _stock_strength(scheduler, arguments["strength"])
        with scheduler.bound(arguments.get("generator")):
            # diffusers means None by default, whatever its annotation says
            return super().__call__(state, cast(Any, output), **arguments)

    def _prepare(self, num_steps: int) -> None:
        """See that the adapters are on, and that each network will get the steps of its expert."""
        like: Any = self
        if has_own_networks(self.recipe):
            check_counts(like, self.recipe, self.recipe.grid(num_steps))
        if self._fewstep_experts is not None:
            complaint = self._fewstep_experts.prepare(like)
            if complaint is not None:
                warnings.warn(complaint, stacklevel=USER)


@functools.cache
def _few_step_modular_class(stock: type) -> type:
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (FewStepModularPipeline, stock), names)


def _check_blocks_can(pipe: ModularPipeline, recipe: FewStepRecipe) -> None:
    name = type(pipe).__name__
    if "scheduler" not in pipe.components:
        raise PipelineError(f"{name} has no scheduler component; add a denoising block to it first")
    if any(size != 1.0 for grid in recipe.grids for size in grid.sizes):
        raise PipelineError(
            f"this recipe's samples grow from step to step, which {name} cannot do; wrap the "
            "classic pipeline with FewStepPipeline"
        )
    if recipe.routes or recipe.sampler.kind != "step":
        kinds = {"flow_map": "is a flow map with a head", "policy": "is a policy with a head"}
        what = kinds.get(recipe.sampler.kind, "routes prompts to experts")
        raise PipelineError(
            f"this recipe {what}, which modular pipelines do not serve; wrap the classic pipeline "
            "with FewStepPipeline"
        )
    is_flow = recipe.base.schedule.kind == "flow"
    starts = [grid.sigmas[0] for grid in recipe.grids]
    if is_flow and recipe.sampler.first_noise == "scaled" and min(starts) < 1.0:
        raise PipelineError(
            f"this recipe begins at sigma {min(starts):g}, but {name}'s blocks draw noise of "
            "deviation 1; wrap the classic pipeline with FewStepPipeline"
        )


def _guiders(pipe: ModularPipeline, recipe: FewStepRecipe) -> dict[str, Any]:
    """The guider components that guide as the recipe says, where the pipeline has any."""
    guidance = recipe.guidance
    is_on = guidance.mode in ("cfg", "true_cfg")
    if guidance.mode == "embedded" and "guidance_scale" not in pipe.blocks.input_names:
        raise _no_place_for(pipe, "'embedded'", "an input for the scale")
    names = [name for name in GUIDERS if name in pipe.components]
    if is_on and not names:
        raise _no_place_for(pipe, repr(guidance.mode), "a guider")
    return {
        name: ClassifierFreeGuidance(guidance_scale=guidance.scale, enabled=is_on) for name in names
    }


def _no_place_for(pipe: ModularPipeline, mode: str, what: str) -> PipelineError:
    return PipelineError(
        f"this recipe's guidance is {mode}, but {type(pipe).__name__} has not {what}; "
        "wrap the classic pipeline with FewStepPipeline"
    )


def _fill(
    recipe: FewStepRecipe,
    num_steps: int,
    known: set[str],
    inputs: dict[str, Any],
    seed: int | Sequence[int] | None,
) -> dict[str, Any]:
    refuse_own_grid(inputs)
    arguments = dict(inputs)
    count = arguments.get("num_inference_steps")
    arguments["num_inference_steps"] = recipe.grid(num_steps if count is None else count).num_steps
    if "guidance_scale" in known and recipe.guidance.mode in ("none", "embedded"):
        arguments.setdefault("guidance_scale", recipe.guidance.scale)
    if recipe.guidance.mode in ("none", "embedded"):
        for negative, positive in NEGATIVES.items():
            if negative in known and arguments.get(positive) is not None:
                arguments.setdefault(negative, arguments[positive])
    if seed is not None:
        arguments["generator"] = seeded_generators(arguments, seed)
    return arguments


def _stock_strength(scheduler: FewStepScheduler, strength: float) -> float:
    """The strength at which blocks that drop a share of the steps begin where ours would."""
    index = snap_start(scheduler.recipe, scheduler.plan, strength).index
    count = len(scheduler.plan)
    share = (count - index) / count
    # Blocks round in two ways, both down; check that this share is cut where it should be.
    if int(count * share) != count - index or int(count - count * share) != index:
        raise PipelineError(
            f"strength {strength:g} cannot be told to a modular pipeline of {count} steps; "
            "wrap the classic pipeline with FewStepPipeline"
        )
    return share
