"""FewStepRecipe: everything a host must know to sample a few-step model right, and no more.

A recipe travels as one JSON string: in a safetensors file's `__metadata__["fewstep.recipe"]`, in
`fewstep_recipe.json` beside an exported model, and in fewstep's zoo. It is checked completely when
it is made or read; a recipe that exists is a recipe that can be obeyed. No torch.
"""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from fewstep import strict_json
from fewstep.errors import RecipeError, RecipeVersionError
from fewstep.noise_schedule import Flow, Level, NoiseSchedule, TrigFlow, Vp, levels_of
from fewstep.sampling import Prediction

T = TypeVar("T")
FORMAT_NAME = "fewstep.recipe"
FORMAT_MAJOR = 1
METADATA_KEY = "fewstep.recipe"
SIDECAR_NAME = "fewstep_recipe.json"
SIGMA_TOLERANCE = 1e-4
"""How far a grid's sigma may be from its timestep's (diffusers' tables are float32)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The noise schedule the base was trained on.

    Only the fields of its kind may be set: betas for "vp", shift for "flow", sigma_data for
    "trigflow".
    """

    kind: Literal["vp", "flow", "trigflow"]
    num_train_timesteps: int = 1000
    beta_schedule: Literal["scaled_linear", "linear"] | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    shift: float | None = None
    """Only for grids made on demand (`steps: "any"`); stored grids are already shifted."""
    sigma_data: float | None = None

    def __post_init__(self) -> None:
        betas = ("beta_schedule", "beta_start", "beta_end")
        needed = {"vp": betas, "flow": ("shift",), "trigflow": ("sigma_data",)}[self.kind]
        for name in (*betas, "shift", "sigma_data"):
            value = getattr(self, name)
            if (value is not None) != (name in needed):
                verb = "needs" if name in needed else "does not take"
                raise RecipeError(f"base.schedule of kind {self.kind!r} {verb} {name}")
            if isinstance(value, float) and value <= 0.0:
                raise RecipeError(f"base.schedule.{name} must be above 0, got {value:g}")
        if self.num_train_timesteps < 1:
            raise RecipeError("base.schedule.num_train_timesteps must be >= 1")

    def build(self) -> NoiseSchedule:
        """The schedule as arithmetic."""
        if self.kind == "flow":
            return Flow(_set(self.shift), self.num_train_timesteps)
        if self.kind == "trigflow":
            return TrigFlow(_set(self.sigma_data))
        return Vp(
            _set(self.beta_start),
            _set(self.beta_end),
            _set(self.beta_schedule),
            self.num_train_timesteps,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """What the adapter was trained on."""

    family: str
    """Short family name: sd15, sdxl, sd3, flux, wan, ..."""
    prediction: Prediction
    schedule: Schedule
    model_id: str | None = None
    """Hub id or a name for people; never used to load anything silently."""
    fingerprint: str | None = None
    """`sha256:` digest of the base denoiser's weights, where known."""
    max_sequence_length: int | None = None
    """Text tokens the model was trained with, where the pipeline takes it as an argument."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """One step count: what the network sees, already shifted.

    Attributes:
        timesteps: The network's clock, N values, strictly falling.
        sigmas: x_t = alpha * x0 + sigma * epsilon; N + 1 values, strictly falling, the last is the
            terminal (0 for clean data; TCD-style models may end a little above).
        experts: Index into `experts` of each step; empty without experts.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    experts: tuple[int, ...] = ()

    @property
    def num_steps(self) -> int:
        """N, the number of network calls of one image without guidance."""
        return len(self.timesteps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionShift:
    """Flow shift that depends on the image size: mu interpolates in image tokens."""

    base_shift: float
    max_shift: float
    base_tokens: int
    max_tokens: int
    kind: Literal["exponential", "linear"] = "exponential"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How a step is made from x0.

    Attributes:
        kind: "step" is the one step function with its stochasticity; "flow_map" and "policy" name
            models whose network takes a target time or returns a policy.
        stochasticity: 0 Euler/DDIM, 1 re-noising (LCM, DMD2), between TCD's gamma.
        noise: The noise convention; "torch_cpu/1" is one CPU stream per image, float32.
    """

    kind: Literal["step", "flow_map", "policy"] = "step"
    stochasticity: float = 0.0
    noise: Literal["torch_cpu/1"] = "torch_cpu/1"

    def __post_init__(self) -> None:
        if not 0.0 <= self.stochasticity <= 1.0:
            raise RecipeError(
                f"sampler.stochasticity must be 0 to 1, got {self.stochasticity:g}; "
                "0 is Euler/DDIM, 1 re-noises"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """Classifier-free guidance at inference: `uncond + scale * (cond - uncond)`, 1 = off.

    Attributes:
        mode: "none" (one pass per step), "cfg", "embedded" (scale is a network input), "true_cfg"
            (cfg beside an embedded scale).
        scale: The scale in that convention; must be 1 for "none".
        negative_prompt: Whether a negative prompt changes the picture.
    """

    mode: Literal["none", "cfg", "embedded", "true_cfg"] = "none"
    scale: float = 1.0
    negative_prompt: Literal["inert", "works"] = "inert"

    def __post_init__(self) -> None:
        if self.mode == "none" and self.scale != 1.0:
            raise RecipeError(
                f"guidance.mode is none but guidance.scale is {self.scale:g}; write scale 1"
            )
        if self.mode in ("none", "embedded") and self.negative_prompt == "works":
            raise RecipeError(
                f"guidance.negative_prompt cannot work with mode {self.mode!r}; write inert"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """How the adapter's weights are applied."""

    scale: float = 1.0
    """Multiplies alpha / rank at load time."""
    alpha: Literal["in_file", "baked"] = "in_file"
    """"in_file": alpha tensors or metadata are in the file; "baked": alpha equals rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """An adapter that serves one interval of noise, (sigma_low, sigma_high]."""

    adapter: str
    sigma_high: float
    sigma_low: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where the weights and these numbers come from."""

    objective: str | None = None
    teacher: str | None = None
    config_hash: str | None = None
    scores: dict[str, float] | None = None
    licence: str | None = None
    source: str | None = None
    created_by: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FewStepRecipe:
    """How to sample one few-step model. See the classes above for each part.

    Attributes:
        base: What it was trained on.
        grids: One per supported step count, fewest steps first.
        steps: "strict": only the listed counts; "any": other counts get an even grid.
        default_steps: The count used when the user names none.

    Raises:
        RecipeError: A rule is broken; the message names the field.
    """

    base: Base
    grids: tuple[Grid, ...]
    default_steps: int
    steps: Literal["strict", "any"] = "strict"
    sampler: Sampler = Sampler()
    guidance: Guidance = Guidance()
    lora: Lora = Lora()
    experts: tuple[Expert, ...] = ()
    resolution_shift: ResolutionShift | None = None
    provenance: Provenance = Provenance()
    format: str = f"{FORMAT_NAME}/{FORMAT_MAJOR}"

    def __post_init__(self) -> None:
        _check_format(self.format)
        if not self.grids:
            raise RecipeError("grids is empty; list at least one step count")
        counts = [grid.num_steps for grid in self.grids]
        if counts != sorted(set(counts)):
            raise RecipeError(f"grids must be in order of step count, each once; got {counts}")
        if self.default_steps not in counts and self.steps == "strict":
            raise RecipeError(
                f"default_steps is {self.default_steps}, but the grids have {counts} steps"
            )
        _check_experts(self.experts)
        schedule = self.base.schedule.build()
        for grid in self.grids:
            _check_grid(grid, schedule, self.experts)

    def grid(self, num_steps: int | None = None) -> Grid:
        """The grid for a step count.

        Args:
            num_steps: Wanted count; None means `default_steps`.

        Raises:
            RecipeError: The recipe is strict and does not list this count.
        """
        count = self.default_steps if num_steps is None else num_steps
        for grid in self.grids:
            if grid.num_steps == count:
                return grid
        if self.steps == "strict" or count < 1:
            supported = ", ".join(str(grid.num_steps) for grid in self.grids)
            raise RecipeError(f"this model was not made for {count} steps; use {supported}")
        schedule = self.base.schedule.build()
        timesteps = schedule.uniform_timesteps(count)
        sigmas = tuple(schedule.sigma_of_timestep(t) for t in timesteps)
        experts = tuple(_expert_at(self.experts, s) for s in sigmas) if self.experts else ()
        return Grid(timesteps=timesteps, sigmas=(*sigmas, 0.0), experts=experts)

    def levels(self, num_steps: int | None = None) -> tuple[Level, ...]:
        """The N + 1 levels of a grid, float64, ready for `sampling.step`."""
        grid = self.grid(num_steps)
        return levels_of(self.base.schedule.build(), grid.timesteps, grid.sigmas)

    def nfe(self, num_steps: int | None = None) -> int:
        """Network evaluations per image; guidance counts double."""
        double = self.guidance.mode in ("cfg", "true_cfg") and self.guidance.scale != 1.0
        return self.grid(num_steps).num_steps * (2 if double else 1)

    def to_json(self, indent: int | None = None) -> str:
        """The recipe as JSON; `from_json` gives back an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=indent, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "FewStepRecipe":
        """Read and check a recipe.

        Raises:
            RecipeError: Not JSON, an unknown key, a wrong type or a broken rule.
            RecipeVersionError: Written by a newer major format.
        """
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"the recipe is not valid JSON ({error})") from error
        if not isinstance(data, dict) or "format" not in data:
            raise RecipeError(
                f'the recipe has no "format" key; expected "{FORMAT_NAME}/{FORMAT_MAJOR}"'
            )
        _check_format(data["format"])
        return strict_json.read(FewStepRecipe, data, error=RecipeError)

    @staticmethod
    def from_file(path: Path) -> "FewStepRecipe":
        """Read a sidecar file; errors name the file."""
        try:
            return FewStepRecipe.from_json(path.read_text(encoding="utf-8"))
        except RecipeError as error:
            raise type(error)(f"{path}: {error}") from error


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe; published as docs/recipe.schema.json."""
    schema = strict_json.schema(FewStepRecipe)
    schema["properties"]["format"] = {"const": f"{FORMAT_NAME}/{FORMAT_MAJOR}"}
    schema["required"].append("format")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fewstep recipe",
        **schema,
    }


def _check_format(text: object) -> None:
    name, _, major = text.partition("/") if isinstance(text, str) else ("", "", "")
    if name != FORMAT_NAME or not major.isdecimal():
        raise RecipeError(f'format must be "{FORMAT_NAME}/{FORMAT_MAJOR}", got {text!r}')
    if int(major) > FORMAT_MAJOR:
        raise RecipeVersionError(
            f"this recipe has format {text}, this fewstep reads up to {FORMAT_NAME}/{FORMAT_MAJOR};"
            " upgrade with: pip install -U fewstep"
        )
    if int(major) != FORMAT_MAJOR:
        raise RecipeError(f'format must be "{FORMAT_NAME}/{FORMAT_MAJOR}", got {text!r}')


def _check_grid(grid: Grid, schedule: NoiseSchedule, experts: tuple[Expert, ...]) -> None:
    name = f"the grid of {grid.num_steps} steps"
    if not grid.timesteps:
        raise RecipeError("a grid has no timesteps; give at least one")
    if len(grid.sigmas) != len(grid.timesteps) + 1:
        raise RecipeError(
            f"{name} has {len(grid.sigmas)} sigmas; wanted {grid.num_steps + 1}, "
            "the last being the terminal (0 for clean data)"
        )
    for what, values in (("timesteps", grid.timesteps), ("sigmas", grid.sigmas)):
        if any(a <= b for a, b in itertools.pairwise(values)):
            raise RecipeError(f"{name} has {what} that do not fall strictly: {list(values)}")
        if values[-1] < 0.0:
            raise RecipeError(f"{name} has a negative value in {what}: {list(values)}")
    if grid.sigmas[0] > 1.0 + SIGMA_TOLERANCE:
        raise RecipeError(
            f"{name} starts at sigma {grid.sigmas[0]:g}; wanted at most 1 (x = alpha*x0 + sigma*"
            "eps; a Karras sigma s is s / sqrt(1 + s^2) here)"
        )
    if grid.sigmas[-1] >= 0.1:
        raise RecipeError(
            f"{name} ends at sigma {grid.sigmas[-1]:g}; append the terminal, 0 for clean data"
        )
    for timestep, sigma in zip(grid.timesteps, grid.sigmas, strict=False):
        if abs(schedule.timestep_of_sigma(sigma) - timestep) > 1.0 and (
            abs(_sigma_at(schedule, timestep, name) - sigma) > SIGMA_TOLERANCE
        ):
            raise RecipeError(
                f"{name} pairs timestep {timestep:g} with sigma {sigma:g}, but the schedule says "
                f"{_sigma_at(schedule, timestep, name):g}; store both after shifting, shifted once"
            )
    _check_grid_experts(grid, experts, name)


def _sigma_at(schedule: NoiseSchedule, timestep: float, name: str) -> float:
    try:
        return schedule.sigma_of_timestep(timestep)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error


def _check_experts(experts: tuple[Expert, ...]) -> None:
    for expert in experts:
        if expert.sigma_low >= expert.sigma_high:
            raise RecipeError(
                f"expert {expert.adapter!r} covers sigma {expert.sigma_low:g} to "
                f"{expert.sigma_high:g}; sigma_low must be below sigma_high"
            )
    for first, second in itertools.pairwise(experts):
        if first.sigma_low != second.sigma_high:
            kind = "overlap" if first.sigma_low < second.sigma_high else "leave a gap"
            raise RecipeError(
                f"experts {first.adapter!r} and {second.adapter!r} {kind}: one ends at sigma "
                f"{first.sigma_low:g}, the next starts at {second.sigma_high:g}"
            )
    if experts and (experts[0].sigma_high < 1.0 or experts[-1].sigma_low > 0.0):
        raise RecipeError("experts must cover sigma 1 to 0 without gaps, highest noise first")


def _check_grid_experts(grid: Grid, experts: tuple[Expert, ...], name: str) -> None:
    if len(grid.experts) != (grid.num_steps if experts else 0):
        raise RecipeError(
            f"{name} assigns {len(grid.experts)} steps to experts; wanted "
            f"{grid.num_steps if experts else 0}"
        )
    for index, (chosen, sigma) in enumerate(zip(grid.experts, grid.sigmas, strict=False)):
        expected = _expert_at(experts, sigma)
        if chosen != expected:
            raise RecipeError(
                f"{name} gives step {index} (sigma {sigma:g}) to expert {chosen}, but the sigma "
                f"intervals say {expected}; make them agree"
            )


def _expert_at(experts: tuple[Expert, ...], sigma: float) -> int:
    for index, expert in enumerate(experts):
        if expert.sigma_low < sigma:
            return index
    return len(experts) - 1


def _set(value: T | None) -> T:
    assert value is not None  # guaranteed by Schedule.__post_init__
    return value
