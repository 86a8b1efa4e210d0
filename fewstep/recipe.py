"""FewStepRecipe: everything a host must know to sample a few-step model right, and no more.

A recipe travels as one JSON string: in a safetensors file's `__metadata__["fewstep.recipe"]`, in
`fewstep_recipe.json` beside an exported model, and in fewstep's zoo. It is checked completely when
it is made or read; a recipe that exists is a recipe that can be obeyed. No torch.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep import strict_json
from fewstep.errors import ConfigError, RecipeError, RecipeVersionError
from fewstep.noise_schedule import Level, levels_of
from fewstep.recipe_checks import (
    check_all_used,
    check_can_shift,
    check_experts,
    check_flow_map,
    check_grid,
    check_grid_experts,
    check_policy,
    check_routes,
    check_steps,
    expert_at,
)
from fewstep.recipe_grids import Grid, ResolutionShift, SecondStage, SolverRow
from fewstep.recipe_parts import (
    Base,
    Expert,
    Guidance,
    Lora,
    Provenance,
    Route,
    Sampler,
    Schedule,
)
from fewstep.recipe_policy import StepPolicy

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
    "Route",
    "Sampler",
    "Schedule",
    "SecondStage",
    "SolverRow",
    "StepPolicy",
    "json_schema",
]

FORMAT_NAME = "fewstep.recipe"
FORMAT_MAJOR = 1
METADATA_KEY = "fewstep.recipe"
SIDECAR_NAME = "fewstep_recipe.json"


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
    routes: tuple[Route, ...] = ()
    resolution_shift: ResolutionShift | None = None
    second_stage: SecondStage | None = None
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
        if self.resolution_shift is not None:
            check_can_shift(self.base, self.grids)
        second = () if self.second_stage is None else (self.second_stage.grid,)
        check_experts(self.experts)
        check_routes(self.routes, self.experts, self.sampler, self.guidance)
        if self.sampler.kind == "flow_map":
            check_flow_map(self.base, (*self.grids, *second), self.experts)
        if self.sampler.kind == "policy":
            check_policy(
                self.base,
                (*self.grids, *second),
                self.sampler,
                self.guidance,
                others=self._with_one_velocity(),
            )
        if self.experts and second:
            raise RecipeError("experts and second_stage cannot be combined; leave one of them out")
        for grid in (*self.grids, *second):
            check_grid(grid, self.base)
            check_steps(grid, self.sampler)
            check_grid_experts(grid, self.experts)
        if self.steps == "strict":
            check_all_used(self.experts, self.grids)

    def _with_one_velocity(self) -> tuple[str, ...]:
        """Fields in use that a policy has no place for."""
        fields = {
            "experts": bool(self.experts),
            "resolution_shift": self.resolution_shift is not None,
            "steps 'any'": self.steps == "any",
        }
        return tuple(name for name, is_used in fields.items() if is_used)

    def grid(self, num_steps: int | None = None, *, mu: float | None = None) -> Grid:
        """The grid for a step count.

        Args:
            num_steps: Wanted count; None means `default_steps`.
            mu: Size-dependent shift (`resolution_shift.mu`); looked at only by recipes that have
                one, whose grids are stored unshifted. None leaves those as stored.

        Raises:
            RecipeError: The recipe is strict and does not list this count, or no even grid of
                this many steps exists.
        """
        count = self.default_steps if num_steps is None else num_steps
        grid = self._stored_grid(count)
        if self.resolution_shift is None or mu is None:
            return grid
        sigmas = tuple(self.resolution_shift.shifted(s, mu) if s else s for s in grid.sigmas)
        total = self.base.schedule.num_train_timesteps
        return dataclasses.replace(
            grid, sigmas=sigmas, timesteps=tuple(total * sigma for sigma in sigmas[:-1])
        )

    def _stored_grid(self, count: int) -> Grid:
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
        experts = tuple(expert_at(self.experts, s) for s in sigmas) if self.experts else ()
        return Grid(timesteps=timesteps, sigmas=(*sigmas, terminal), experts=experts)

    def for_second_stage(self) -> "FewStepRecipe":
        """The recipe of the second stage alone, as if that were all.

        Raises:
            RecipeError: There is no second stage.
        """
        if self.second_stage is None:
            raise RecipeError("this recipe has one stage; sample it without naming a stage")
        grid = self.second_stage.grid
        return dataclasses.replace(
            self,
            grids=(grid,),
            default_steps=grid.num_steps,
            steps="strict",
            experts=(),
            second_stage=None,
        )

    def levels(self, num_steps: int | None = None, *, mu: float | None = None) -> tuple[Level, ...]:
        """The N + 1 levels of a grid, float64, ready for `sampling.step`."""
        grid = self.grid(num_steps, mu=mu)
        return levels_of(self.base.schedule.build(), grid.timesteps, grid.sigmas)

    def nfe(self, num_steps: int | None = None) -> int:
        """Network evaluations per image; guidance counts double."""
        double = self.guidance.mode in ("cfg", "true_cfg") and self.guidance.scale != 1.0
        return self.grid(num_steps).num_steps * (2 if double else 1)

    def to_json(self, indent: int | None = None) -> str:
        """The recipe as JSON; `from_json` gives back an equal recipe.

        Keys that came after 0.1.0 are written only where they say something: readers of that
        release refuse keys they do not know, and should go on reading what they can sample.
        """
        data = dataclasses.asdict(self)
        if not self.routes:
            del data["routes"]
        if self.lora.kind == "lora":
            del data["lora"]["kind"]
        if self.sampler.policy is None:
            del data["sampler"]["policy"]
        return json.dumps(data, indent=indent, allow_nan=False)

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
