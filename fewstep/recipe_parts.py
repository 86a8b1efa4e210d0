"""The parts of a recipe. Each checks its own rules when it is made, in Python or from JSON.

What ties parts together (grids to the schedule, steps to experts) is FewStepRecipe's to check.
"""

import re
from dataclasses import dataclass
from typing import Literal, TypeVar

from fewstep import strict_json
from fewstep.errors import RecipeError
from fewstep.noise_schedule import Flow, NoiseSchedule, TrigFlow, Vp
from fewstep.recipe_policy import StepPolicy
from fewstep.sampling import Prediction

T = TypeVar("T")
FITTING_SCHEDULES = {
    "epsilon": ("vp", "flow", "trigflow"),
    "x0": ("vp", "flow", "trigflow"),
    "v": ("vp", "trigflow"),
    "flow": ("flow",),
    "trigflow": ("trigflow",),
}
"""Prediction -> the schedules on which its arithmetic (`sampling.to_x0`) holds."""


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
        strict_json.check(self, error=RecipeError, where="base.schedule")
        betas = ("beta_schedule", "beta_start", "beta_end")
        needed = {"vp": betas, "flow": ("shift",), "trigflow": ("sigma_data",)}[self.kind]
        for name in (*betas, "shift", "sigma_data"):
            value = getattr(self, name)
            if (value is not None) != (name in needed):
                verb = "needs" if name in needed else "does not take"
                raise RecipeError(f"base.schedule of kind {self.kind!r} {verb} {name}")
            if isinstance(value, int | float) and value <= 0.0:
                raise RecipeError(f"base.schedule.{name} must be above 0, got {value:g}")
        if self.kind == "vp" and not _set(self.beta_start) <= _set(self.beta_end) < 1.0:
            raise RecipeError(
                f"base.schedule needs beta_start <= beta_end < 1, got {self.beta_start:g} and "
                f"{self.beta_end:g}"
            )
        if self.num_train_timesteps < 1:
            raise RecipeError(
                f"base.schedule.num_train_timesteps must be >= 1, got {self.num_train_timesteps}"
            )
        if self.num_train_timesteps > 1_000_000:  # a VP schedule makes a table this long
            raise RecipeError("base.schedule.num_train_timesteps must be at most 1000000")

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

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="base")
        fitting = FITTING_SCHEDULES[self.prediction]
        if self.schedule.kind not in fitting:
            raise RecipeError(
                f"base.prediction {self.prediction!r} does not go with a schedule of kind "
                f"{self.schedule.kind!r}; it needs {' or '.join(fitting)}"
            )
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise RecipeError(
                f"base.max_sequence_length must be >= 1, got {self.max_sequence_length}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """How a step is made from x0.

    Attributes:
        kind: "step" is the one step function with its stochasticity. "flow_map": the network is
            told the time a step ends at too and gives the average velocity up to there (MeanFlow),
            so that the deterministic step is exact. "policy": its output layer is wider and gives
            the velocity at every point of a step, which is followed without the network (pi-Flow).
        stochasticity: 0 Euler/DDIM, 1 re-noising (LCM, DMD2), between TCD's gamma.
        noise: The noise convention; "torch_cpu/1" is one CPU stream per image, float32.
        first_noise: What the network sees first: noise times the first sigma ("scaled", as trained
            by us and as stock Euler samples), or noise of deviation 1 whatever the sigma ("unit",
            as stock DDIM, LCM and TCD do and as models that start at t = 399 or 800 expect).
        clip_x0: Predicted clean data is clipped to plus or minus this (TDD); None does not clip.
        noise_correction: The first step moves along the noise it started from, not along the
            noise implied by the prediction (Imagine Flash, Kohler et al. 2024).
        policy: How a policy is read; needed by kind "policy", and taken by no other.
    """

    kind: Literal["step", "flow_map", "policy"] = "step"
    stochasticity: float = 0.0
    noise: Literal["torch_cpu/1"] = "torch_cpu/1"
    first_noise: Literal["scaled", "unit"] = "scaled"
    clip_x0: float | None = None
    noise_correction: bool = False
    policy: StepPolicy | None = None

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="sampler")
        if (self.policy is not None) != (self.kind == "policy"):
            verb = "needs" if self.kind == "policy" else "does not take"
            raise RecipeError(f"sampler.kind {self.kind!r} {verb} sampler.policy")
        if self.clip_x0 is not None and self.clip_x0 <= 0.0:
            raise RecipeError(f"sampler.clip_x0 must be above 0, got {self.clip_x0:g}")
        if not 0.0 <= self.stochasticity <= 1.0:
            raise RecipeError(
                f"sampler.stochasticity must be 0 to 1, got {self.stochasticity:g}; "
                "0 is Euler/DDIM, 1 re-noises"
            )
        others = self.stochasticity or self.noise_correction or self.clip_x0 is not None
        if self.kind != "step" and others:
            how = {"flow_map": "jumps along an average velocity", "policy": "follows a policy"}
            raise RecipeError(
                f"sampler.kind {self.kind!r} {how[self.kind]}, which is deterministic as it is; "
                "write stochasticity 0, no clip_x0 and no noise_correction"
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
        strict_json.check(self, error=RecipeError, where="guidance")
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
    kind: Literal["lora", "lorad"] = "lora"
    """"lorad": the file holds low-rank rotations of weight columns (WaDi) in place of LoRA."""

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="lora")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """An adapter that serves one interval of noise: sigma_low <= sigma < sigma_high.

    A step exactly at a boundary is the noisier expert's, as with diffusers' `boundary_ratio`.
    """

    adapter: str
    """Name of its LoRA among the adapter's files: "high_noise", "low_noise", ..."""
    sigma_high: float
    sigma_low: float
    component: str | None = None
    """Pipeline component it adapts where each interval has a network of its own (Wan 2.2:
    "transformer", then "transformer_2"); None where all experts share one base."""

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="experts[]")
        if self.sigma_low >= self.sigma_high:
            raise RecipeError(
                f"expert {self.adapter!r} covers sigma {self.sigma_low:g} to "
                f"{self.sigma_high:g}; sigma_low must be below sigma_high"
            )


ROUTE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A route's name is a part of tensor names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """An adapter that serves one group of prompts.

    Which group a prompt is in is told by its embedding: the nearest of the centroids in the adapter
    file (`route.<adapter>.centroid`).
    """

    adapter: str
    """Name of the expert in the adapter file."""
    prompts: tuple[str, ...] = ()
    """Prompts or labels of its group, for people; the router does not look at them."""

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="routes[]")
        if not ROUTE_NAME.fullmatch(self.adapter):
            raise RecipeError(
                f"routes[].adapter is {strict_json.shown(self.adapter)}; wanted 1 to 64 letters, "
                "digits, - or _, as it is a part of tensor names"
            )


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

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="provenance")


def _set(value: T | None) -> T:
    assert value is not None  # guaranteed by Schedule.__post_init__
    return value
