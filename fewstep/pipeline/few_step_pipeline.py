"""FewStepPipeline: any stock diffusers pipeline, sampled as its recipe says.

    pipe = FewStepPipeline.from_pretrained(base, adapter="adapter.safetensors")
    image = pipe("a handwritten seven", seed=1).images[0]

The pipeline object stays what it was: same class name, components, offload, compile, callbacks.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin

from fewstep.adapters import AdapterHeader, read_header
from fewstep.errors import PipelineError
from fewstep.loading import load_stock_pipeline
from fewstep.model_files import HUB_OPTIONS, AdapterFile, find_adapter, find_base_sidecar
from fewstep.pipeline import attached_adapter
from fewstep.pipeline.attached_adapter import AttachedAdapter
from fewstep.pipeline.call_arguments import fill_arguments, has_inert_negative_prompt
from fewstep.pipeline.description import describe_sampling
from fewstep.pipeline.few_step_class import few_step_class, stock_class
from fewstep.pipeline.guidance import call_parameters, rule_of, translate_guidance
from fewstep.pipeline.suitability import check_suitable
from fewstep.recipe import SIDECAR_NAME, FewStepRecipe
from fewstep.recipe_resolution import ResolvedRecipe, recipe_sources, resolve_recipe
from fewstep.schedulers import FewStepScheduler

logger = logging.getLogger(__name__)


@dataclass
class Wrapping:
    """What wrapping did to a pipeline, so that it can be undone.

    Attributes:
        resolved: The recipe and where it came from.
        num_steps: Step count of a call that names none.
        replaced_scheduler: The scheduler the pipeline came with.
        adapter: What is attached, if anything.
        has_warned: Whether the inert negative prompt was mentioned; once is enough.
    """

    resolved: ResolvedRecipe
    num_steps: int
    replaced_scheduler: SchedulerMixin
    adapter: AttachedAdapter | None
    has_warned: bool = False


class FewStepPipeline(DiffusionPipeline):
    """A stock pipeline under a recipe; made by `from_pretrained` or `wrap`, never directly."""

    _fewstep: Wrapping

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        base: str | Path,
        adapter: str | Path | None = None,
        *,
        recipe: FewStepRecipe | str | Path | None = None,
        steps: int | None = None,
        adapter_scale: float | None = None,
        pipeline_class: type[DiffusionPipeline] | None = None,
        **diffusers_kwargs: Any,
    ) -> "FewStepPipeline":
        """Load a base, attach an adapter, obey its recipe.

        Args:
            base: Folder of a diffusers pipeline, or its hub name.
            adapter: LoRA file, a folder with one, or its hub name (`find_adapter`).
            recipe: Wins over what the files say; a recipe or the path of a JSON file.
            steps: Default step count; None takes the recipe's.
            adapter_scale: Wins over the recipe's.
            pipeline_class: For another task than the base's own, e.g. image to image.
            **diffusers_kwargs: For diffusers' from_pretrained: torch_dtype, variant, ...

        Raises:
            RecipeNotFoundError: Nothing says how to sample; the message names what was looked at.
            AdapterError: The adapter is damaged or does not fit all of its modules on the base.
            PipelineError: The recipe is for another kind of model.
        """
        hub = {key: diffusers_kwargs[key] for key in HUB_OPTIONS if key in diffusers_kwargs}
        file = None if adapter is None else find_adapter(adapter, _without_revision(hub))
        header = None if file is None else read_header(file.path)
        resolved = _resolve(recipe, file, header, base, find_base_sidecar(base, hub))
        pipe = load_stock_pipeline(base, pipeline_class=pipeline_class, **diffusers_kwargs)
        return _wrap(pipe, resolved, header, steps, adapter_scale)

    @staticmethod
    def wrap(
        pipe: DiffusionPipeline,
        *,
        recipe: FewStepRecipe | str | Path | None = None,
        adapter: str | Path | None = None,
        steps: int | None = None,
        adapter_scale: float | None = None,
    ) -> "FewStepPipeline":
        """Put a loaded pipeline under a recipe, in place.

        Args and errors as `from_pretrained`. A pipeline made from a wrapped one (`from_pipe`)
        still has its FewStepScheduler and needs no other source of the recipe.
        """
        if isinstance(pipe, FewStepPipeline):
            raise PipelineError("this pipeline is already wrapped; unwrap() it first")
        file = None if adapter is None else find_adapter(adapter)
        header = None if file is None else read_header(file.path)
        origin = pipe.config.get("_name_or_path")
        sidecar = find_base_sidecar(origin, {"local_files_only": True}) if origin else None
        scheduler = pipe.components.get("scheduler")
        installed = scheduler.recipe if isinstance(scheduler, FewStepScheduler) else None
        resolved = _resolve(recipe, file, header, origin, sidecar, installed)
        return _wrap(pipe, resolved, header, steps, adapter_scale)

    def unwrap(self) -> DiffusionPipeline:
        """Give the stock pipeline back, in place: class, scheduler, adapter removed.

        A fused adapter stays in the weights; that is logged.
        """
        if not isinstance(self, FewStepPipeline):  # FewStepPipeline.unwrap(pipe) of a stock one
            raise PipelineError("this pipeline is not wrapped; there is nothing to unwrap")
        state = self._fewstep
        if state.adapter is not None and state.adapter.is_fused:
            logger.warning("the adapter is fused into the weights and stays there")
        elif state.adapter is not None:
            attached_adapter.detach(self)
        self.scheduler = state.replaced_scheduler
        del self._fewstep
        self.__class__ = stock_class(self)
        return self

    def __call__(self, *args: Any, seed: int | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The stock class's call, with `seed`; `few_step_class` makes the real one."""
        raise PipelineError("FewStepPipeline is not called itself; use from_pretrained or wrap")

    @property
    def recipe(self) -> FewStepRecipe:
        """The recipe in force."""
        return self._fewstep.resolved.recipe

    @property
    def adapter(self) -> AttachedAdapter | None:
        """The adapter attached by us, fused or not."""
        return self._fewstep.adapter

    def describe(self) -> str:
        """How this pipeline samples, for people: grid, network calls, guidance, noise."""
        state = self._fewstep
        stock = stock_class(self)
        _, is_known = rule_of(stock.__name__, call_parameters(stock))
        return describe_sampling(
            class_name=stock.__name__,
            recipe=state.resolved.recipe,
            source=state.resolved.source,
            num_steps=state.num_steps,
            adapter=state.adapter,
            guidance_arguments=translate_guidance(stock, state.resolved.recipe.guidance),
            is_guidance_known=is_known,
        )

    def fuse(self) -> "FewStepPipeline":
        """Merge the adapter into the weights of every component that has it; saving needs this.

        Raises:
            PipelineError: There is no adapter that could be fused.
        """
        state = self._fewstep
        if state.adapter is None or state.adapter.is_fused:
            raise PipelineError("there is no unfused adapter on this pipeline; attach one first")
        state.adapter = attached_adapter.fuse(self, state.adapter)
        return self

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save a folder that stock diffusers loads, with the recipe beside it.

        The scheduler written is the stock one the pipeline came with, because a class of ours in
        model_index.json could not be loaded without fewstep; `FewStepPipeline.from_pretrained`
        finds the recipe again.

        Raises:
            PipelineError: LoRA layers are attached; they would be saved under names that diffusers
                replaces by random weights on loading.
        """
        adapted = attached_adapter.adapted_components(self)
        if adapted:
            raise PipelineError(
                f"{' and '.join(adapted)} has LoRA layers attached, which do not survive saving; "
                "fuse() first to save the few-step model, or unwrap() to save the base"
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = self.recipe.to_json(indent=2)
        (folder / SIDECAR_NAME).write_text(recipe + "\n", encoding="utf-8")
        ours = self.scheduler
        self.scheduler = self._fewstep.replaced_scheduler
        try:
            super().save_pretrained(str(save_directory), *args, **kwargs)
        finally:
            self.scheduler = ours

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # By name alone, pickle would give back the stock class around our state.
        return _rebuild, (stock_class(self), self.__dict__)

    def _sample(
        self, call: Callable[..., Any], given: Mapping[str, Any], seed: int | Sequence[int] | None
    ) -> Any:
        """One call of the stock pipeline under the recipe; `few_step_class` leads here."""
        scheduler = self.scheduler
        if not isinstance(scheduler, FewStepScheduler):
            raise PipelineError(
                f"the scheduler was replaced by {type(scheduler).__name__}, which does not know "
                "the recipe; unwrap() the pipeline to sample it freely"
            )
        state, stock = self._fewstep, stock_class(self)
        recipe = state.resolved.recipe
        arguments = fill_arguments(stock, given, recipe, num_steps=state.num_steps, seed=seed)
        if has_inert_negative_prompt(stock, arguments, recipe) and not state.has_warned:
            state.has_warned = True
            warnings.warn(
                "the negative prompt has no effect: this model runs with guidance "
                f"{recipe.guidance.mode!r}",
                stacklevel=3,
            )
        with scheduler.bound(arguments.get("generator")):
            return call(self, **arguments)


def _wrap(
    pipe: DiffusionPipeline,
    resolved: ResolvedRecipe,
    header: AdapterHeader | None,
    steps: int | None,
    adapter_scale: float | None,
) -> FewStepPipeline:
    recipe, stock = resolved.recipe, type(pipe)
    num_steps = recipe.grid(steps).num_steps
    check_suitable(pipe, recipe)
    scheduler = FewStepScheduler(recipe)
    adapter = None
    if header is not None:
        scale = recipe.lora.scale if adapter_scale is None else adapter_scale
        adapter = attached_adapter.attach(pipe, header, scale)
    elif adapter_scale is not None:
        raise PipelineError("adapter_scale was passed without an adapter; pass adapter= too")
    before = pipe.components["scheduler"]
    if isinstance(before, FewStepScheduler):  # made by from_pipe of a wrapped pipeline
        before = before.replaced or before
    scheduler.replaced = before
    wrapped: Any = pipe
    wrapped._fewstep = Wrapping(resolved, num_steps, before, adapter)
    wrapped.scheduler = scheduler
    wrapped.__class__ = few_step_class(FewStepPipeline, stock)
    return wrapped


def _resolve(
    argument: FewStepRecipe | str | Path | None,
    file: AdapterFile | None,
    header: AdapterHeader | None,
    base: str | Path | None,
    base_sidecar: Path | None,
    installed: FewStepRecipe | None = None,
) -> ResolvedRecipe:
    sources = recipe_sources(
        argument=argument,
        adapter=header,
        adapter_sidecar=None if file is None else file.sidecar,
        base=base,
        base_sidecar=base_sidecar,
        installed=installed,
    )
    return resolve_recipe(sources)


def _without_revision(hub: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hub.items() if key != "revision"}  # it is the base's


def _rebuild(stock: type[DiffusionPipeline], state: dict[str, Any]) -> FewStepPipeline:
    pipe: Any = stock.__new__(stock)
    pipe.__dict__.update(state)
    pipe.__class__ = few_step_class(FewStepPipeline, stock)
    return pipe
