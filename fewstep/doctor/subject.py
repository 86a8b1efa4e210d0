"""What the checks look at: all about one pipeline and adapter, as plain values. No torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.adapters import AdapterHeader, LoraModule
from fewstep.doctor.finding import Finding
from fewstep.doctor.seen import SeenRun
from fewstep.recipe import FewStepRecipe, Grid

FEW = 8
"""Up to this many steps a model is taken for a few-step one where no recipe says so."""


@dataclass(frozen=True, slots=True)
class AppliedLora:
    """One LoRA on one network.

    Attributes:
        name: diffusers' adapter name.
        modules: How many layers carry it.
        scales: The distinct factors of up @ down, alpha / rank x weight; sorted.
        weights: The distinct weights alone.
        dtype: What its matrices are stored as.
        is_active: Whether it takes part at all.
        is_merged: Whether it is merged into the weights (`fuse_lora`) but still attached.
    """

    name: str
    modules: int
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    dtype: str
    is_active: bool
    is_merged: bool


@dataclass(frozen=True, slots=True)
class Network:
    """One denoiser of a pipeline.

    Attributes:
        component: "unet", "transformer", "transformer_2".
        dtype: Of its floating point weights: "float16", ...
        quantised: What its weights are stored as ("float8_e4m3fn"); None for plain floats.
        is_compiled: Whether torch.compile was applied.
        loras: What is attached.
    """

    component: str
    dtype: str
    quantised: str | None
    is_compiled: bool
    loras: tuple[AppliedLora, ...] = ()


@dataclass(frozen=True, slots=True)
class Vae:
    """The VAE of a pipeline.

    Attributes:
        dtype: Of its weights.
        force_upcast: Whether the pipeline decodes in float32 by itself.
        overflows: Whether decoding normal noise gave NaN or infinity; None if not tried.
    """

    dtype: str
    force_upcast: bool
    overflows: bool | None = None


@dataclass(frozen=True, slots=True)
class SchedulerFacts:
    """The pipeline's own scheduler.

    Attributes:
        class_name: Its class.
        is_of_diffusers: Whether the class is part of diffusers.
        config: Its configuration.
        kind: "flow", "vp" or "trigflow": what its samples are.
    """

    class_name: str
    is_of_diffusers: bool
    config: Mapping[str, Any]
    kind: str


@dataclass(frozen=True, slots=True)
class GuidanceFacts:
    """How a pipeline class guides, and what this call asks of it.

    Attributes:
        argument: What runs a second, unconditional pass; None where there is no such thing.
        off: Its value up to which there is one pass.
        values: Guidance arguments -> value in this call, the class's default where not given.
        given: Which of them were given.
        wanted: Arguments as the recipe wants them; empty without a recipe.
        needs_negative: Whether the second pass also needs a negative prompt.
        has_negative: Whether there is one.
    """

    argument: str | None
    off: float
    values: Mapping[str, float]
    given: tuple[str, ...]
    wanted: Mapping[str, float]
    needs_negative: bool
    has_negative: bool

    @property
    def value(self) -> float | None:
        """Of `argument`."""
        return None if self.argument is None else self.values.get(self.argument)

    @property
    def said(self) -> str:
        """`argument` and its value, and whose choice it was."""
        if self.argument is None or self.value is None:
            return "the class guides"
        own = "" if self.argument in self.given else ", the class's default"
        return f"{self.argument} is {self.value:g}{own}"


@dataclass(frozen=True, slots=True)
class StockLoad:
    """What `load_lora_weights` did with a file.

    Attributes:
        loaded: LoRA layers that the pipeline's models had afterwards.
        error: What it raised; None if it did not.
    """

    loaded: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter file that is to be used.

    Attributes:
        header: Of the file.
        modules: Its LoRA pairs.
        family: What it looks made for.
        scale: What it is to be multiplied with.
        stock: What stock diffusers makes of it; None where it was not tried.
    """

    header: AdapterHeader
    modules: tuple[LoraModule, ...]
    family: str | None
    scale: float
    stock: "StockLoad | None" = None

    @property
    def has_alpha_tensors(self) -> bool:
        """Whether its alphas are tensors, which every host reads."""
        return any(name.endswith(".alpha") for name in self.header.tensors)


@dataclass(frozen=True, slots=True)
class Subject:
    """All of it. A lone adapter file has no class, scheduler, networks and runs.

    Attributes:
        class_name: Stock class of the pipeline, "" for a lone file.
        recipe: In force; None without one.
        recipe_source: Where it came from.
        recipe_places: Where a recipe was looked for in vain, in words.
        recipe_warning: What was said when it was found; the zoo marks what is not verified.
        candidates: Zoo entries this may be, best first.
        num_steps: Asked for; None where the pipeline's default counts.
        arguments: The call as given.
        networks: Its denoisers.
        vae: Its VAE.
        scheduler: Its own scheduler.
        guidance: How its class guides.
        fused: Names of LoRAs that were merged into some weights (diffusers' own book).
        is_wrapped: Whether it is a FewStepPipeline already.
        as_called: The probe as called.
        with_fewstep: The probe under the recipe.
        refusal: Why FewStepPipeline cannot serve the recipe here.
        unfit: Why the adapter's files do not fit.
        files: The adapter's files: one, or one per expert.
    """

    class_name: str = ""
    recipe: FewStepRecipe | None = None
    recipe_source: str | None = None
    recipe_places: str = ""
    recipe_warning: str | None = None
    candidates: tuple[str, ...] = ()
    num_steps: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    networks: tuple[Network, ...] = ()
    vae: Vae | None = None
    scheduler: SchedulerFacts | None = None
    guidance: GuidanceFacts | None = None
    fused: tuple[str, ...] = ()
    is_wrapped: bool = False
    as_called: SeenRun | None = None
    with_fewstep: SeenRun | None = None
    refusal: str | None = None
    unfit: str | None = None
    files: tuple[AdapterFile, ...] = ()

    @property
    def grid(self) -> Grid | None:
        """The recipe's grid for the step count asked for, else its default; None without one."""
        if self.recipe is None:
            return None
        counts = {grid.num_steps for grid in self.recipe.grids}
        is_served = self.num_steps in counts or self.recipe.steps == "any"
        return self.recipe.grid(self.num_steps if is_served else None)

    @property
    def run(self) -> SeenRun | None:
        """The probe as called, where it worked."""
        run = self.as_called
        return run if run is not None and run.error is None and run.steps else None

    @property
    def is_few_step(self) -> bool:
        """Whether this is, or is used as, a few-step model."""
        is_short = (run := self.run) and run.is_complete and len(run.steps) <= FEW
        return bool(is_short) or self.recipe is not None

    @property
    def total(self) -> float:
        """Length of the training schedule: timesteps are 0 to this."""
        if self.recipe is not None:
            return float(self.recipe.base.schedule.num_train_timesteps)
        config = {} if self.scheduler is None else self.scheduler.config
        return float(config.get("num_train_timesteps") or 1000)

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        """All LoRAs on all networks."""
        return tuple(lora for network in self.networks for lora in network.loras)


class Check(ABC):
    """Interface: one thing the doctor knows to look for."""

    @abstractmethod
    def examine(self, subject: Subject) -> Finding | None:
        """A finding; None where nothing is wrong."""
