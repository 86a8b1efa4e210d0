"""FewStepPipeline: any stock diffusers pipeline, sampled as its recipe says.

    pipe = FewStepPipeline.from_pretrained(base, adapter="adapter.safetensors")
    image = pipe("a handwritten seven", seed=1).images[0]

The pipeline object stays what it was: same class name, components, offload, compile, callbacks.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline

from fewstep.errors import PipelineError, RecipeNotFoundError
from fewstep.loading import check_source, load_stock_pipeline
from fewstep.model_files import HUB_OPTIONS, find_base_sidecar
from fewstep.pipeline import attached_adapter
from fewstep.pipeline.attached_adapter import AttachedAdapter
from fewstep.pipeline.config_recipes import recipe_of_folder, recipe_of_pipeline
from fewstep.pipeline.description import describe_sampling
from fewstep.pipeline.experts.files import AdapterSource, FoundFile, find_files
from fewstep.pipeline.experts.switch import check_one_per_network
from fewstep.pipeline.few_step_class import few_step_class, stock_class
from fewstep.pipeline.kinds_fit import check_no_head
from fewstep.pipeline.one_call import sample
from fewstep.pipeline.saving import save_folder
from fewstep.pipeline.single_file import existing_file, load_single_file, single_file_recipe
from fewstep.pipeline.stages import at_stage
from fewstep.pipeline.teacher_refine import TeacherRefine
from fewstep.pipeline.wrapping import (
    Wrapping,
    put_under_recipe,
    resolve,
    take_from_under_recipe,
    without_revision,
)
from fewstep.recipe import FewStepRecipe
from fewstep.recipe_resolution import ResolvedRecipe
from fewstep.schedulers import FewStepScheduler


class FewStepPipeline(DiffusionPipeline):
    """A stock pipeline under a recipe; made by `from_pretrained` or `wrap`, never directly."""

    _fewstep: Wrapping

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        base: str | Path,
        adapter: AdapterSource | None = None,
        *,
        recipe: FewStepRecipe | str | Path | None = None,
        steps: int | None = None,
        adapter_scale: float | None = None,
        experts: str = "adapters",
        stage: int = 1,
        probe: bool = True,
        pipeline_class: type[DiffusionPipeline] | None = None,
        **diffusers_kwargs: Any,
    ) -> "FewStepPipeline":
        """Load a base, attach an adapter, obey its recipe.

        Args:
            base: Folder of a diffusers pipeline, or its hub name.
            adapter: LoRA file, a folder with one, or its hub name; with several files, or a
                mapping from names to files, where the recipe has experts (`find_files`).
            recipe: Wins over what the files say; a recipe, the path of a JSON file, or "zoo:NAME".
            steps: Default step count; None takes the recipe's.
            adapter_scale: Wins over the recipe's.
            experts: How experts take turns: "adapters" (least memory), "fused" (fastest) or
                "hotswap" (for `torch.compile`); one adapter alone is carried the same way.
            stage: 2 samples the recipe's second stage, from latents of the first (LTX).
            probe: Whether the first picture makes one network call more per adapter, to see that
                the adapter has an effect.
            pipeline_class: For another task than the base's own, e.g. image to image.
            **diffusers_kwargs: For diffusers' from_pretrained: torch_dtype, variant, ...

        Raises:
            RecipeNotFoundError: Nothing says how to sample; the message names what was looked at.
            OSError: There is no such base.
            AdapterError: The adapter is damaged or does not fit all of its modules on the base.
            PipelineError: The recipe is for another kind of model.
        """
        hub = {key: diffusers_kwargs[key] for key in HUB_OPTIONS if key in diffusers_kwargs}
        files = () if adapter is None else find_files(adapter, without_revision(hub))
        sidecar = find_base_sidecar(base, hub)
        try:
            resolved = resolve(recipe, files, base, sidecar, partial(recipe_of_folder, base))
        except RecipeNotFoundError:
            check_source(base, hub)  # of a base that is not there, that is what is wrong
            raise
        resolved = at_stage(resolved, stage)
        pipe = load_stock_pipeline(base, pipeline_class=pipeline_class, **diffusers_kwargs)
        return _become(pipe, resolved, files, steps, adapter_scale, experts, probe)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        adapter: AdapterSource | None = None,
        *,
        recipe: FewStepRecipe | str | Path | None = None,
        steps: int | None = None,
        adapter_scale: float | None = None,
        experts: str = "adapters",
        stage: int = 1,
        probe: bool = True,
        pipeline_class: type[DiffusionPipeline] | None = None,
        **diffusers_kwargs: Any,
    ) -> "FewStepPipeline":
        """Load a checkpoint in one file (SD1.5, SDXL, SD3, FLUX), and obey its recipe.

        The recipe may be in the checkpoint's own metadata, or beside it as fewstep_recipe.json.

        Args:
            path: A .safetensors file on this machine.
            **diffusers_kwargs: For diffusers' from_single_file; `config=` a diffusers folder of the
                same kind of model keeps it offline. The others as `from_pretrained`.

        Raises:
            PipelineError: There is no such file, or its kind of model cannot be told.
            RecipeNotFoundError: Nothing says how to sample it.
        """
        file = existing_file(path)
        files = () if adapter is None else find_files(adapter)
        resolved = at_stage(single_file_recipe(file, recipe, files), stage)
        pipe = load_single_file(file, pipeline_class=pipeline_class, **diffusers_kwargs)
        return _become(pipe, resolved, files, steps, adapter_scale, experts, probe)

    @staticmethod
    def wrap(
        pipe: DiffusionPipeline,
        *,
        recipe: FewStepRecipe | str | Path | None = None,
        adapter: AdapterSource | None = None,
        steps: int | None = None,
        adapter_scale: float | None = None,
        experts: str = "adapters",
        stage: int = 1,
        probe: bool = True,
    ) -> "FewStepPipeline":
        """Put a loaded pipeline under a recipe, in place.

        Args and errors as `from_pretrained`. A pipeline made from a wrapped one (`from_pipe`)
        still has its FewStepScheduler and needs no other source of the recipe.
        """
        if isinstance(pipe, FewStepPipeline):
            raise PipelineError("this pipeline is already wrapped; unwrap() it first")
        if isinstance(pipe, ModularPipeline):
            raise PipelineError("this is a modular pipeline; use FewStepModularPipeline.wrap")
        files = () if adapter is None else find_files(adapter)
        origin = pipe.config.get("_name_or_path")
        sidecar = find_base_sidecar(origin, {"local_files_only": True}) if origin else None
        scheduler = pipe.components.get("scheduler")
        is_ours = isinstance(scheduler, FewStepScheduler)
        installed = scheduler.recipe if is_ours else partial(recipe_of_pipeline, pipe)
        resolved = at_stage(resolve(recipe, files, origin, sidecar, installed), stage)
        return _become(pipe, resolved, files, steps, adapter_scale, experts, probe)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Refused: it would give a pipeline that knows no recipe.

        Raises:
            PipelineError: Always; it says what to write instead.
        """
        raise PipelineError(
            "a wrapped class cannot be made from another pipeline; use from_pipe of the stock "
            "class, then FewStepPipeline.wrap what it gives, which keeps the recipe"
        )

    def unwrap(self) -> DiffusionPipeline:
        """Give the stock pipeline back, in place: class, scheduler, adapter removed.

        A fused adapter stays in the weights; that is logged.
        """
        if not isinstance(self, FewStepPipeline):  # FewStepPipeline.unwrap(pipe) of a stock one
            raise PipelineError("this pipeline is not wrapped; there is nothing to unwrap")
        take_from_under_recipe(self, self._fewstep)
        del self._fewstep
        self.__class__ = stock_class(self)
        return self

    def __call__(
        self,
        *args: Any,
        seed: int | Sequence[int] | None = None,
        teacher_refine: TeacherRefine | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock class's call, with our arguments; `few_step_class` makes the real one."""
        raise PipelineError("FewStepPipeline is not called itself; use from_pretrained or wrap")

    @property
    def recipe(self) -> FewStepRecipe:
        """The recipe in force."""
        return self._fewstep.resolved.recipe

    @property
    def adapter(self) -> AttachedAdapter | None:
        """The adapter attached by us, fused or not; with experts, the first one's."""
        return next(iter(self.adapters), None)

    @property
    def adapters(self) -> tuple[AttachedAdapter, ...]:
        """What we attached, in the order of the recipe's experts."""
        experts = self._fewstep.experts
        return () if experts is None else experts.adapters

    def describe(self) -> str:
        """How this pipeline samples, for people: grid, network calls, guidance, noise."""
        stock, resolved = stock_class(self), self._fewstep.resolved
        return describe_sampling(
            stock, resolved.recipe, resolved.source, self._fewstep.num_steps, self.adapters
        )

    def fuse(self) -> "FewStepPipeline":
        """Merge the adapter into the weights of every component that has it; saving needs this.

        Experts with a network each (Wan 2.2) are merged into their own networks.

        Raises:
            PipelineError: There is no adapter that could be fused, experts share a network, or
                the adapter has a head.
        """
        experts = self._fewstep.experts
        if experts is None or experts.is_permanent:
            raise PipelineError("there is no unfused adapter on this pipeline; attach one first")
        experts.fuse(self)
        return self

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Save a folder that stock diffusers loads, with the recipe and a model card beside it.

        The scheduler written is the stock one that comes nearest to the recipe (`saving`);
        `FewStepPipeline.from_pretrained` finds the recipe itself again.

        Raises:
            PipelineError: Experts share a network, the network has a head of the adapter, or LoRA
                layers are attached; they would be saved under names that diffusers replaces by
                random weights on loading.
        """
        check_one_per_network(self.adapters)
        check_no_head(self.adapters)
        attached_adapter.check_savable(self)
        save_folder(
            self,
            super().save_pretrained,
            Path(save_directory),
            *args,
            class_name=stock_class(self).__name__,
            recipe=self.recipe,
            num_steps=self._fewstep.num_steps,
            replaced=self._fewstep.replaced_scheduler,
            **kwargs,
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # By name alone, pickle would give back the stock class around our state. That state comes
        # first: the scheduler's hook leads to it, and must lead to the copy's in a copy.
        return _rebuild, (stock_class(self), {"_fewstep": self._fewstep, **self.__dict__})

    def _sample(
        self,
        call: Callable[..., Any],
        given: Mapping[str, Any],
        seed: int | Sequence[int] | None,
        refine: TeacherRefine | None = None,
    ) -> Any:
        """One call of the stock pipeline under the recipe; `few_step_class` leads here."""
        return sample(self, self._fewstep, call, given, seed=seed, refine=refine)


def _become(
    pipe: DiffusionPipeline,
    resolved: ResolvedRecipe,
    files: Sequence[FoundFile],
    steps: int | None,
    adapter_scale: float | None,
    experts: str,
    probe: bool,
) -> FewStepPipeline:
    wrapped: Any = pipe
    wrapped._fewstep = put_under_recipe(
        pipe,
        resolved,
        files,
        steps=steps,
        adapter_scale=adapter_scale,
        experts=experts,
        probe=probe,
    )
    wrapped.__class__ = few_step_class(FewStepPipeline, type(pipe))
    return wrapped


def _rebuild(stock: type[DiffusionPipeline], state: dict[str, Any]) -> FewStepPipeline:
    pipe: Any = stock.__new__(stock)
    pipe.__dict__.update(state)
    pipe.__class__ = few_step_class(FewStepPipeline, stock)
    switch = state["_fewstep"].experts
    if switch is not None:
        switch.hold(pipe)
    return pipe
