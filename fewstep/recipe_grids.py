"""What the network sees, step by step: the grids of a recipe and what may hang on them.

A plain grid is timesteps and sigmas. The other fields carry what some published models need and
leave empty otherwise; `recipe_plan` turns all of them into numbers once, so hosts only apply those.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, cast

from fewstep import strict_json
from fewstep.errors import RecipeError
from fewstep.noise_schedule import shift_sigma

LONG_SEQUENCE = 4300
"""Image tokens from which FLUX.2's shift no longer depends on the step count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverRow:
    """One step as a fitted linear map, in place of Euler's own weights:

        next = sample * sample_n + x0 * x0_n + previous_sample * sample_{n-1}
               + previous_x0 * x0_{n-1}

    Every linear solver with a memory of one call is rows of this kind: D-ODE's lambdas, Bespoke
    RK1 and RK2 (two rows a step, midpoint first), second-order multistep.
    """

    sample: float
    x0: float
    previous_sample: float = 0.0
    previous_x0: float = 0.0

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="grids[].solver[]")

    @property
    def needs_previous(self) -> bool:
        """Whether it looks at the call before."""
        return self.previous_sample != 0.0 or self.previous_x0 != 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """One step count: what the network sees, already shifted.

    Attributes:
        timesteps: Where on the schedule each call is, N values, strictly falling; also what the
            network is told, unless `clock` says otherwise.
        sigmas: x_t = alpha * x0 + sigma * epsilon; N + 1 values, strictly falling, the last is the
            terminal (0 for clean data; TCD-style models may end a little above).
        experts: Index into `experts` of each step; empty without experts.
        clock: What the network is told where that is not `timesteps`; empty otherwise.
        read_at: Whether the output is read as clean data at the noise of `timesteps` or of `clock`
            (NitroSD: only the fresh noise follows `timesteps`).
        sizes: Height and width of each step's sample as a fraction of the finished one, rising to
            1 (SwD's scale ladder); empty where all steps are full size.
        solver: Fitted weights of each step; empty for the plain step.
        stops: Sigma at which each step's deterministic part stops before fresh noise lifts it to
            the next sigma, in place of one stochasticity (ancestral Euler); empty otherwise.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    experts: tuple[int, ...] = ()
    clock: tuple[float, ...] = ()
    sizes: tuple[float, ...] = ()
    solver: tuple[SolverRow, ...] = ()
    stops: tuple[float, ...] = ()
    read_at: Literal["timesteps", "clock"] = "timesteps"

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="grids[]")
        if not self.timesteps:
            raise RecipeError("a grid has no timesteps; give at least one")
        self._check_values()
        self._check_lengths()
        if self.sizes:
            self._check_sizes()
        if self.solver and self.solver[0].needs_previous:
            raise RecipeError(
                f"{self.name} has a solver whose first row looks at a call before it; "
                "set its previous_sample and previous_x0 to 0"
            )

    @property
    def num_steps(self) -> int:
        """N, the number of network calls of one image without guidance."""
        return len(self.timesteps)

    @property
    def name(self) -> str:
        """For messages."""
        return f"the {self.num_steps}-step grid"

    def _check_values(self) -> None:
        if len(self.sigmas) != self.num_steps + 1:
            raise RecipeError(
                f"{self.name} has {len(self.sigmas)} sigmas; wanted {self.num_steps + 1}, "
                "the last being the terminal (0 for clean data)"
            )
        for what, values in (("timesteps", self.timesteps), ("sigmas", self.sigmas)):
            if any(a <= b for a, b in itertools.pairwise(values)):
                raise RecipeError(
                    f"{self.name} has {what} that do not fall strictly: {list(values)}"
                )
            if values[-1] < 0.0:
                raise RecipeError(f"{self.name} has a negative value in {what}: {list(values)}")
        if self.sigmas[0] > 1.0:
            raise RecipeError(
                f"{self.name} starts at sigma {self.sigmas[0]:g}; wanted at most 1 (x = alpha*x0 + "
                "sigma*eps; a Karras sigma s is s / sqrt(1 + s^2) here)"
            )
        if self.sigmas[-1] >= 0.1:
            raise RecipeError(
                f"{self.name} ends at sigma {self.sigmas[-1]:g}; append the terminal, 0 for clean "
                "data"
            )

    def _check_lengths(self) -> None:
        for what in ("clock", "sizes", "solver", "stops"):
            count = len(getattr(self, what))
            if count not in (0, self.num_steps):
                raise RecipeError(
                    f"{self.name} has {count} values in {what}; wanted {self.num_steps} or none"
                )

        if self.read_at == "clock" and not self.clock:
            raise RecipeError(f"{self.name} is read at a clock it does not have; add clock")
        for stop, sigma in zip(self.stops, self.sigmas[1:], strict=False):
            if not 0.0 <= stop <= sigma:
                raise RecipeError(
                    f"{self.name} has a step that stops at sigma {stop:g} on its way to {sigma:g}; "
                    "wanted 0 to that sigma"
                )

    def _check_sizes(self) -> None:
        rising = all(a <= b for a, b in itertools.pairwise(self.sizes))
        if not rising or self.sizes[0] <= 0.0 or self.sizes[-1] != 1.0:
            raise RecipeError(
                f"{self.name} has sizes {list(self.sizes)}; wanted fractions above 0 that rise to 1"
            )
        if self.solver:
            raise RecipeError(f"{self.name} has sizes and a solver; leave one of them out")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionShift:
    """Flow shift that depends on the image size; the grids beside it are stored unshifted.

    Attributes:
        rule: How mu follows the size: "interpolated" between two token counts (FLUX, SD3.5,
            Qwen-Image), or "flux2_empirical" (FLUX.2-klein: tokens and step count, no numbers).
        base_shift: mu at `base_tokens`.
        max_shift: mu at `max_tokens`.
        base_tokens: Image tokens (after patching) of the smallest image.
        max_tokens: The same of the largest.
        kind: "exponential" shifts by e^mu, "linear" by mu.
    """

    rule: Literal["interpolated", "flux2_empirical"] = "interpolated"
    base_shift: float | None = None
    max_shift: float | None = None
    base_tokens: int | None = None
    max_tokens: int | None = None
    kind: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="resolution_shift")
        for name in ("base_shift", "max_shift", "base_tokens", "max_tokens"):
            if (getattr(self, name) is not None) != (self.rule == "interpolated"):
                verb = "needs" if self.rule == "interpolated" else "does not take"
                raise RecipeError(f"resolution_shift with rule {self.rule!r} {verb} {name}")
        if self.base_tokens is not None and self.max_tokens is not None:
            if not 0 < self.base_tokens < self.max_tokens:
                raise RecipeError(
                    "resolution_shift needs 0 < base_tokens < max_tokens, got "
                    f"{self.base_tokens} and {self.max_tokens}"
                )

    def mu(self, num_tokens: int, num_steps: int) -> float:
        """mu for an image.

        Args:
            num_tokens: Image tokens the transformer sees.
            num_steps: Step count; only FLUX.2's rule looks at it.

        Source:
            diffusers `calculate_shift`; black-forest-labs/flux2 `compute_empirical_mu`.
        """
        if self.rule == "flux2_empirical":
            return _flux2_mu(num_tokens, num_steps)
        low, high = (
            cast(int, self.base_tokens),
            cast(int, self.max_tokens),
        )  # __post_init__ saw them
        first, last = cast(float, self.base_shift), cast(float, self.max_shift)
        return first + (last - first) * (num_tokens - low) / (high - low)

    def shifted(self, sigma: float, mu: float) -> float:
        """A stored sigma as the network sees it."""
        return shift_sigma(sigma, math.exp(mu) if self.kind == "exponential" else mu)


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondStage:
    """Sampling again from the enlarged result (LTX): noise to the grid's first sigma, then step.

    Attributes:
        grid: The steps of the second stage.
        upscale: How much larger its height and width are.
    """

    grid: Grid
    upscale: float = 2.0

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="second_stage")
        if self.upscale < 1.0:
            raise RecipeError(f"second_stage.upscale must be at least 1, got {self.upscale:g}")


def _flux2_mu(num_tokens: int, num_steps: int) -> float:
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > LONG_SEQUENCE:
        return at_200
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_steps + at_200 - 200.0 * slope
