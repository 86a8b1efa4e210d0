"""The stock scheduler that samples a recipe's grid on its own, for people without fewstep.

A candidate is judged by running it: its timesteps and sigmas are made the way the pipeline class
makes them and compared with the grid. What still differs is said in words, never rounded away.
Read in diffusers 0.42.1; see docs/pipeline.md for the table.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
from diffusers import SchedulerMixin

from fewstep.recipe import FewStepRecipe, Grid
from fewstep.schedulers.stock_config import DIFFUSERS_PREDICTIONS

stock: Any = diffusers
"""Untyped: which arguments a scheduler takes differs by class."""
EVEN_SIGMAS = (  # class name starts with: these pass sigmas = linspace(1, 1 / N, N) by themselves
    *("Flux", "QwenImage", "ZImage", "Krea2", "HunyuanVideo", "HunyuanImage", "Lumina2"),
    *("LTXPipeline", "LTXImageToVideo", "LTX2", "Chroma", "LongCat", "Ovis", "HunyuanVideo15"),
)
EXACT = 1e-5
"""Relative; stock tables are float32."""
WHOLE = 1.0
"""Timesteps this near are the grid's, cut to whole numbers."""


@dataclass(frozen=True, slots=True)
class StockScheduler:
    """A stock stand-in for a recipe.

    Attributes:
        scheduler: To be saved; None where no stock scheduler makes the grid by itself.
        deviations: How its pictures differ from the recipe's; empty means they do not.
        arguments: What the pipeline must be called with beside steps and guidance.
    """

    scheduler: SchedulerMixin | None
    deviations: tuple[str, ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether stock diffusers draws the recipe's own pictures with it."""
        return self.scheduler is not None and not self.deviations


def stock_scheduler(class_name: str, recipe: FewStepRecipe, num_steps: int) -> StockScheduler:
    """The stock scheduler nearest to a recipe in one pipeline class.

    Args:
        class_name: The stock pipeline class.
        recipe: What to stand in for.
        num_steps: The step count that must come out right.
    """
    grid = recipe.grid(num_steps)
    reason = _not_in_stock(recipe, grid)
    if reason is not None:
        return StockScheduler(None, (reason,))
    kind = recipe.base.schedule.kind
    if kind == "vp":
        return _vp(recipe, grid)
    if kind == "trigflow":
        return _trigflow(recipe, grid)
    return _flow(class_name, recipe, grid)


def _not_in_stock(recipe: FewStepRecipe, grid: Grid) -> str | None:
    for is_there, what in (
        (recipe.sampler.kind != "step", f"the sampler is a {_KINDS[recipe.sampler.kind]}"),
        (grid.clock, "the network's clock differs from the time of the step"),
        (grid.sizes, "samples grow from step to step"),
        (grid.solver, "steps have fitted weights"),
        (grid.stops and not _is_ancestral(recipe, grid), "steps have stops of their own"),
        (recipe.sampler.noise_correction, "the first step is noise-corrected"),
        (recipe.sampler.clip_x0 is not None, "predictions are clipped"),
        (grid.sigmas[-1] != 0.0, "the grid ends above clean data"),
        (recipe.second_stage is not None, "there is a second stage"),
    ):
        if is_there:
            return f"{what}, which no stock scheduler does"
    return None


_KINDS = {
    "step": "plain step",
    "flow_map": "flow map, whose network is told where each step ends",
    "policy": "policy",
}


def _vp(recipe: FewStepRecipe, grid: Grid) -> StockScheduler:
    schedule, gamma = recipe.base.schedule, recipe.sampler.stochasticity
    config: dict[str, Any] = {
        "num_train_timesteps": schedule.num_train_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "prediction_type": DIFFUSERS_PREDICTIONS[recipe.base.prediction],
        "steps_offset": 1,  # not used by these spacings, but SD1.5 pipelines insist on it
    }
    unit = recipe.sampler.first_noise == "unit"
    deviations: list[str] = []
    arguments: tuple[tuple[str, Any], ...] = ()
    if grid.stops:
        gamma = 0.0  # not looked at: the stops say where fresh noise begins
        scheduler = stock.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **config)
        if unit:
            deviations.append(f"the first noise is scaled to sigma {grid.sigmas[0]:.4g}")
    elif gamma == 0.0 and not unit:
        scheduler = stock.EulerDiscreteScheduler(timestep_spacing="trailing", **config)
    elif gamma == 0.0:
        scheduler = stock.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **config)
    else:
        is_lcm = gamma == 1.0
        make = stock.LCMScheduler if is_lcm else stock.TCDScheduler
        scheduler = make(clip_sample=False, **config)
        if not is_lcm:
            arguments = (("eta", gamma),)
        if not unit and grid.sigmas[0] < 1.0 - EXACT:
            deviations.append(f"the first noise is not scaled to sigma {grid.sigmas[0]:.4g}")
    with warnings.catch_warnings():  # EulerDiscrete still converts tensors the numpy 1 way
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(grid.num_steps)
    if not _near(scheduler.timesteps.tolist(), grid.timesteps, EXACT):
        if gamma == 0.0:
            return StockScheduler(None, (_no_grid(grid),))
        arguments = (("timesteps", [round(t) for t in grid.timesteps]), *arguments)
        if any(t != round(t) for t in grid.timesteps):
            deviations.append("the network is told whole timesteps")
    return StockScheduler(scheduler, tuple(deviations), arguments)


def _trigflow(recipe: FewStepRecipe, grid: Grid) -> StockScheduler:
    if recipe.sampler.stochasticity != 1.0:
        return StockScheduler(None, ("SCMScheduler always draws fresh noise, this recipe less",))
    scheduler = stock.SCMScheduler(sigma_data=recipe.base.schedule.sigma_data)
    middle = 1.3 if grid.num_steps == 2 else None  # SANA-Sprint's own default
    scheduler.set_timesteps(grid.num_steps, intermediate_timesteps=middle)
    if not _near(scheduler.timesteps.tolist()[:-1], grid.timesteps, EXACT):
        return StockScheduler(None, (_no_grid(grid),))
    arguments = () if middle is not None else (("intermediate_timesteps", None),)
    return StockScheduler(scheduler, (), arguments)


def _flow(class_name: str, recipe: FewStepRecipe, grid: Grid) -> StockScheduler:
    gamma = recipe.sampler.stochasticity
    if recipe.base.prediction != "flow" or gamma not in (0.0, 1.0):
        return StockScheduler(None, ("no stock flow scheduler takes this prediction and noise",))
    shift, steps = _shift_of(grid), grid.num_steps
    passes_sigmas = class_name.startswith(EVEN_SIGMAS)
    if shift is None or (recipe.resolution_shift is not None and not passes_sigmas):
        return StockScheduler(None, (_no_grid(grid),))
    total = recipe.base.schedule.num_train_timesteps
    if passes_sigmas:
        config = _dynamic(recipe) if recipe.resolution_shift is not None else {"shift": shift}
        scheduler = stock.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=total, stochastic_sampling=gamma == 1.0, **config
        )
        repeats = ("fresh noise is not drawn from the call's generator",) if gamma else ()
        return StockScheduler(scheduler, repeats)
    if gamma == 1.0:
        return StockScheduler(None, ("no stock scheduler draws fresh noise on this grid alone",))
    scheduler = stock.UniPCMultistepScheduler(
        num_train_timesteps=total,
        use_flow_sigmas=True,
        flow_shift=shift,
        prediction_type="flow_prediction",
        solver_order=1,
        disable_corrector=list(range(steps)),  # with it, it is no longer Euler
    )
    scheduler.set_timesteps(steps)
    if not _near(scheduler.timesteps.tolist(), grid.timesteps, WHOLE / grid.timesteps[-1]):
        return StockScheduler(None, (_no_grid(grid),))
    return StockScheduler(scheduler, ("the network is told whole timesteps, one less at most",))


def _is_ancestral(recipe: FewStepRecipe, grid: Grid) -> bool:
    """Whether the stops are those of ancestral Euler: `down = next^2 / now` in Karras sigmas."""
    if recipe.base.schedule.kind != "vp":
        return False
    karras = [sigma / math.sqrt(1.0 - sigma * sigma) for sigma in grid.sigmas[:-1]]
    downs = [following**2 / now for now, following in pairwise(karras)]
    stops = [down / math.sqrt(1.0 + down * down) for down in downs]
    return _near(stops, grid.stops[: len(stops)], 1e-3)


def _shift_of(grid: Grid) -> float | None:
    """The shift that makes a grid of even sigmas, if one does."""
    even = [1.0 - i / grid.num_steps for i in range(grid.num_steps)]
    if grid.num_steps == 1:
        return 1.0 if grid.sigmas[0] == 1.0 else None
    u, sigma = even[1], grid.sigmas[1]
    shift = sigma * (1.0 - u) / (u * (1.0 - sigma))
    made = [shift * u / (1.0 + (shift - 1.0) * u) for u in even]
    return round(shift, 6) if _near(made, grid.sigmas[:-1], 1e-4) else None


def _dynamic(recipe: FewStepRecipe) -> dict[str, Any]:
    shift = recipe.resolution_shift
    assert shift is not None  # asked for by the caller alone
    config: dict[str, Any] = {"use_dynamic_shifting": True, "time_shift_type": shift.kind}
    if shift.rule == "interpolated":
        config |= {
            "base_shift": shift.base_shift,
            "max_shift": shift.max_shift,
            "base_image_seq_len": shift.base_tokens,
            "max_image_seq_len": shift.max_tokens,
        }
    return config


def _near(made: Sequence[float], wanted: Sequence[float], relative: float) -> bool:
    if len(made) != len(wanted):
        return False
    return bool(np.all(np.abs(np.subtract(made, wanted)) <= relative * np.abs(wanted) + 1e-9))


def _no_grid(grid: Grid) -> str:
    return f"no stock scheduler makes the timesteps {[round(t, 2) for t in grid.timesteps]} alone"
