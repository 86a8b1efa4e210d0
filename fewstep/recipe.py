"""FewStepRecipe: everything a host must know to sample a few-step model right, and no more.

A recipe travels as one JSON string: in a safetensors file's `__metadata__["fewstep.recipe"]`, in
`fewstep_recipe.json` beside an exported model, and in fewstep's zoo. It is checked completely when
it is made or read; a recipe that exists is a recipe that can be obeyed. No torch.
"""

import dataclasses
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep import strict_json
from fewstep.errors import ConfigError, RecipeError, RecipeVersionError
from fewstep.noise_schedule import Level, NoiseSchedule, levels_of
from fewstep.recipe_parts import (
    Base,
    Expert,
    Grid,
    Guidance,
    Lora,
    Provenance,
    ResolutionShift,
    Sampler,
    Schedule,
)

__all__ = [
    "FORMAT_MAJOR",
    "FORMAT_NAME",
    "METADATA_KEY",
    "SIDECAR_NAME",
    "Base",
    "Expert",
    "FewStepRecipe",
    "Grid",
    "Guidance",
    "Lora",
    "Provenance",
    "ResolutionShift",
    "Sampler",
    "Schedule",
    "json_schema",
]

FORMAT_NAME = "fewstep.recipe"
FORMAT_MAJOR = 1
METADATA_KEY = "fewstep.recipe"
SIDECAR_NAME = "fewstep_recipe.json"
SIGMA_TOLERANCE = 1e-4
"""How far a grid's sigma may be from its timestep's (diffusers' tables are float32)."""
MIN_ALPHA = 1e-6
"""Below this, x0 = (sample - sigma * epsilon) / alpha is noise divided by nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FewStepRecipe:
    """How to sample one few-step model. See the classes above for each part.

    Attributes:
        base: What it was trained on.
        grids: One per supported step count, fewest steps first.
        steps: "strict": only the listed counts; "any": other counts get an even grid that ends at
            the terminal of the last listed one.
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
        strict_json.check(self, error=RecipeError)
        _check_format(self.format)
        if not self.grids:
            raise RecipeError("grids is empty; list at least one step count")
        counts = [grid.num_steps for grid in self.grids]
        if counts != sorted(set(counts)):
            raise RecipeError(f"grids must be in order of step count, each once; got {counts}")
        if self.default_steps < 1 or (self.steps == "strict" and self.default_steps not in counts):
            raise RecipeError(
                f"default_steps is {self.default_steps}, but the grids have {counts} steps; "
                "name one of them"
            )
        if self.resolution_shift is not None and self.base.schedule.kind != "flow":
            raise RecipeError(
                f"resolution_shift needs a flow schedule, got kind {self.base.schedule.kind!r}; "
                "leave it out"
            )
        _check_experts(self.experts)
        for grid in self.grids:
            _check_grid(grid, self.base)
            _check_grid_experts(grid, self.experts)
        if self.steps == "strict":
            _check_all_used(self.experts, self.grids)

    def grid(self, num_steps: int | None = None) -> Grid:
        """The grid for a step count.

        Args:
            num_steps: Wanted count; None means `default_steps`.

        Raises:
            RecipeError: The recipe is strict and does not list this count, or no even grid of
                this many steps exists.
        """
        count = self.default_steps if num_steps is None else num_steps
        for grid in self.grids:
            if grid.num_steps == count:
                return grid
        if self.steps == "strict" or count < 1:
            supported = ", ".join(str(grid.num_steps) for grid in self.grids)
            raise RecipeError(f"this model was not made for {count} steps; use {supported}")
        return self._even_grid(count)

    def _even_grid(self, count: int) -> Grid:
        schedule = self.base.schedule.build()
        try:
            timesteps = schedule.uniform_timesteps(count)
        except ConfigError as error:
            raise RecipeError(str(error)) from error
        sigmas = tuple(schedule.sigma_of_timestep(t) for t in timesteps)
        terminal = self.grids[-1].sigmas[-1]
        experts = tuple(_expert_at(self.experts, s) for s in sigmas) if self.experts else ()
        return Grid(timesteps=timesteps, sigmas=(*sigmas, terminal), experts=experts)

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
            data: Any = json.loads(text, object_pairs_hook=_object)
        except RecipeError:
            raise
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"the recipe is not valid JSON: {error}") from error
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
            return FewStepRecipe.from_json(path.read_text(encoding="utf-8-sig"))  # Notepad's BOM
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: not UTF-8 text; save it as UTF-8") from error
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:  # json would silently keep the last
            raise RecipeError(f"key {key!r} appears twice in one object; keep one")
        values[key] = value
    return values


def _check_format(text: object) -> None:
    known = f"{FORMAT_NAME}/{FORMAT_MAJOR}"
    if text == known:
        return
    version = re.fullmatch(rf"{re.escape(FORMAT_NAME)}/([0-9]+)(\.[0-9]+)*", str(text))
    if version and int(version[1]) > FORMAT_MAJOR:
        raise RecipeVersionError(
            f"this recipe has format {text}, this fewstep reads up to {known};"
            " upgrade with: pip install -U fewstep"
        )
    raise RecipeError(f'format must be "{known}", got {text!r}')


def _check_grid(grid: Grid, base: Base) -> None:
    """The clock and the noise of each step must be the same point of the base's schedule."""
    name = f"the {grid.num_steps}-step grid"
    schedule = base.schedule.build()
    tick = schedule.uniform_timesteps(1)[0] / 1000  # models round their clock; never by more
    for timestep, sigma in zip(grid.timesteps, grid.sigmas, strict=False):
        expected = _sigma_at(schedule, timestep, name)
        nearest = schedule.timestep_of_sigma(sigma)
        is_on_schedule = abs(schedule.sigma_of_timestep(nearest) - sigma) <= SIGMA_TOLERANCE
        is_rounded = is_on_schedule and abs(nearest - timestep) < tick
        if not is_rounded and abs(expected - sigma) > SIGMA_TOLERANCE:
            is_flow = base.schedule.kind == "flow"
            raise RecipeError(
                f"{name} pairs timestep {timestep:g} with sigma {sigma:g}, but the schedule says "
                f"{expected:g}; {'store both shifted, once' if is_flow else 'correct one of them'}"
            )
    if base.prediction == "epsilon" and schedule.alpha_of_sigma(grid.sigmas[0]) < MIN_ALPHA:
        raise RecipeError(
            f"{name} starts at sigma {grid.sigmas[0]:g}, where an epsilon prediction does not "
            "give x0; start below it"
        )


def _sigma_at(schedule: NoiseSchedule, timestep: float, name: str) -> float:
    try:
        return schedule.sigma_of_timestep(timestep)
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error


def _check_experts(experts: tuple[Expert, ...]) -> None:
    highs = [expert.sigma_high for expert in experts]
    if highs != sorted(highs, reverse=True):
        raise RecipeError(f"experts must be listed highest noise first; got sigma_high {highs}")
    for first, second in itertools.pairwise(experts):
        if first.sigma_low != second.sigma_high:
            kind = "overlap" if first.sigma_low < second.sigma_high else "leave a gap"
            raise RecipeError(
                f"experts {first.adapter!r} and {second.adapter!r} {kind}: one ends at sigma "
                f"{first.sigma_low:g}, the next starts at {second.sigma_high:g}"
            )
    if experts and (experts[0].sigma_high < 1.0 or experts[-1].sigma_low > 0.0):
        raise RecipeError(
            f"experts cover sigma {experts[0].sigma_high:g} to {experts[-1].sigma_low:g}; "
            "they must cover 1 to 0"
        )


def _check_grid_experts(grid: Grid, experts: tuple[Expert, ...]) -> None:
    name = f"the {grid.num_steps}-step grid"
    if len(grid.experts) != (grid.num_steps if experts else 0):
        raise RecipeError(
            f"{name} assigns {len(grid.experts)} steps to experts; wanted "
            f"{grid.num_steps if experts else '0, as there are no experts'}"
        )
    for index, (chosen, sigma) in enumerate(zip(grid.experts, grid.sigmas, strict=False)):
        expected = _expert_at(experts, sigma)
        if chosen != expected:
            raise RecipeError(
                f"{name} gives step {index} (sigma {sigma:g}) to expert {chosen}, but the sigma "
                f"intervals say {expected}; make them agree"
            )


def _check_all_used(experts: tuple[Expert, ...], grids: tuple[Grid, ...]) -> None:
    used = {index for grid in grids for index in grid.experts}
    for index, expert in enumerate(experts):
        if index not in used:
            raise RecipeError(
                f"expert {expert.adapter!r} serves no step of any grid; leave it out or add a step"
            )


def _expert_at(experts: tuple[Expert, ...], sigma: float) -> int:
    for index, expert in enumerate(experts):
        if expert.sigma_low <= sigma:
            return index
    return len(experts) - 1
