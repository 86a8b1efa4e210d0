"""Checks of the grid: what the network is told and given at each call, and what it was made for.

`seen` is the probe as called; a recipe says what was trained. Without a recipe only what is wrong
for any few-step model is a finding. No torch.
"""

from collections.abc import Sequence

from fewstep.doctor.finding import Finding
from fewstep.doctor.seen import SeenRun
from fewstep.doctor.subject import Check, Subject
from fewstep.doctor.trained import NEAR, are_near, shown_grid, trained_timesteps
from fewstep.noise_schedule import shift_sigma

ALMOST_CLEAN = 0.05
"""A network call at a sigma below this has nothing left to do in a few-step model."""
HARDLY_NOISE = 0.97
"""A first call below this share of the schedule starts from noise it is not told of."""
LEVEL_TOLERANCE = 0.03


class NotTrained(Check):
    """The network is called at other timesteps than it was trained at."""

    def examine(self, subject: Subject) -> Finding | None:
        run, trained = subject.run, trained_timesteps(subject)
        if run is None or not trained or run.starts_from_image:
            return None
        seen = run.timesteps
        if len(seen) != len(trained):
            return self._wrong_count(subject, run, trained)
        if are_near(seen, trained, subject.total):
            return None
        return Finding(
            "grid/not-trained",
            "error",
            f"trained at {shown_grid(trained)}, but {run.scheduler} calls it at {shown_grid(seen)}",
            "sample with FewStepPipeline, whose table is the recipe's",
            {"trained": list(trained), "seen": list(seen)},
        )

    def _wrong_count(
        self, subject: Subject, run: SeenRun, trained: Sequence[float]
    ) -> Finding | None:
        recipe = subject.recipe
        if recipe is None or (recipe.steps == "any" and run.is_complete):
            return None
        count = str(len(run.steps)) if run.is_complete else f"more than {len(run.steps) - 1}"
        counts = ", ".join(str(grid.num_steps) for grid in recipe.grids)
        return Finding(
            "grid/wrong-step-count",
            "error",
            f"{run.scheduler} makes {count} steps {shown_grid(run.timesteps)}, but this model was "
            f"made for {counts}: {shown_grid(trained)}",
            f"pass num_inference_steps={len(trained)}, or sample with FewStepPipeline",
            {"trained": list(trained), "seen": list(run.timesteps)},
        )


class DoubleShift(Check):
    """A flow scheduler that shifts a grid which is already shifted."""

    def examine(self, subject: Subject) -> Finding | None:
        run, scheduler = subject.run, subject.scheduler
        if run is None or scheduler is None or run.starts_from_image:
            return None
        config, seen = scheduler.config, run.timesteps
        shift = config.get("shift")
        if scheduler.class_name != "FlowMatchEulerDiscreteScheduler" or len(seen) < 2:
            return None
        if not isinstance(shift, int | float) or shift == 1.0 or config.get("use_dynamic_shifting"):
            return None
        count, total = len(seen), subject.total
        even = [1.0 - i / count for i in range(count)]
        once = [total * shift_sigma(u, shift) for u in even]
        trained = trained_timesteps(subject) or once
        top, low = shift_sigma(1.0, shift), shift_sigma(1.0 / total, shift)
        default = [top + (low - top) * i / (count - 1) for i in range(count)]
        given = subject.arguments.get("sigmas")
        start = list(given) if given is not None else default
        is_shifted = given is None or are_near([total * s for s in start], trained, total)
        twice = [total * shift_sigma(s, shift) for s in start]
        if not is_shifted or not are_near(seen, twice, total) or are_near(seen, trained, total):
            return None
        what = "its default grid" if given is None else "the grid passed to it"
        return Finding(
            "grid/double-shift",
            "error",
            f"{scheduler.class_name} applies shift={shift:g} to {what}, which is shifted already: "
            f"the network is called at {shown_grid(seen)} instead of {shown_grid(trained)}",
            f"sample with FewStepPipeline; in stock diffusers {_by_hand(trained, shift, total)}",
            {"seen": list(seen), "shift": shift, "wanted": list(trained)},
        )


class ShiftTerminal(Check):
    """A last call stretched to the scheduler's `shift_terminal`."""

    def examine(self, subject: Subject) -> Finding | None:
        run, scheduler = subject.run, subject.scheduler
        if run is None or scheduler is None or not run.is_complete or not subject.is_few_step:
            return None
        terminal = scheduler.config.get("shift_terminal")
        trained = trained_timesteps(subject)
        if not terminal or abs(run.timesteps[-1] - subject.total * terminal) > NEAR:
            return None
        if trained and are_near(trained, run.timesteps, subject.total):
            return None
        return Finding(
            "grid/shift-terminal",
            "error" if trained else "warning",
            f"the scheduler's shift_terminal={terminal:g} stretches the grid: the network is "
            f"called at {shown_grid(run.timesteps)}"
            + (f" instead of {shown_grid(trained)}" if trained else ", the last time for nothing"),
            f"rebuild it: {scheduler.class_name}.from_config(pipe.scheduler.config, "
            "shift_terminal=None), or sample with FewStepPipeline",
            {"seen": list(run.timesteps), "shift_terminal": terminal},
        )


class LastCallClean(Check):
    """A network call spent where there is nothing left to remove."""

    def examine(self, subject: Subject) -> Finding | None:
        run = subject.run
        if run is None or not run.is_complete or not subject.is_few_step or len(run.steps) < 2:
            return None
        last = run.steps[-1]
        trained = trained_timesteps(subject)
        lowest = ALMOST_CLEAN * subject.total
        if last.timestep > lowest or (trained and trained[-1] <= lowest):
            return None
        return Finding(
            "grid/last-call-at-clean",
            "warning",
            f"the last of {len(run.steps)} network calls is at timestep {last.timestep:.4g} of "
            f"{subject.total:g}, where the picture is finished: it does {len(run.steps) - 1} steps",
            "end the grid higher: timestep_spacing='trailing', or a recipe's own grid",
            {"seen": list(run.timesteps)},
        )


class NeverSeesNoise(Check):
    """Pure noise, called something less ("leading" spacing)."""

    def examine(self, subject: Subject) -> Finding | None:
        run, scheduler = subject.run, subject.scheduler
        if run is None or scheduler is None or run.starts_from_image or not subject.is_few_step:
            return None
        first, trained = run.timesteps[0], trained_timesteps(subject)
        wanted = trained[0] if trained else subject.total
        if scheduler.kind == "trigflow" or first >= HARDLY_NOISE * wanted:
            return None
        spacing = scheduler.config.get("timestep_spacing")
        cause = f" (timestep_spacing={spacing!r})" if spacing else ""
        return Finding(
            "grid/never-sees-noise",
            "error",
            f"the first sample is pure noise, but {run.scheduler} tells the network timestep "
            f"{first:.4g} of {subject.total:g}{cause}; grey or noisy pictures",
            f"rebuild it: {run.scheduler}.from_config(pipe.scheduler.config, "
            "timestep_spacing='trailing'), or sample with FewStepPipeline",
            {"seen": list(run.timesteps), "timestep_spacing": spacing},
        )


class ClockDisagrees(Check):
    """Samples at another noise level than the network is told."""

    def examine(self, subject: Subject) -> Finding | None:
        run, scheduler, recipe = subject.run, subject.scheduler, subject.recipe
        if run is None or scheduler is None or run.starts_from_image or scheduler.kind != "flow":
            return None
        grid = subject.grid
        if recipe is not None and (recipe.base.schedule.kind != "flow" or (grid and grid.clock)):
            return None
        off = [
            (run.told(i, subject.total) / subject.total, step.calls[0].noise)
            for i, step in enumerate(run.steps)
            if i > 0 and step.calls
        ]
        worst = max(off, key=lambda pair: abs(pair[0] - pair[1]), default=(0.0, 0.0))
        if abs(worst[0] - worst[1]) <= LEVEL_TOLERANCE + run.spread:
            return None
        return Finding(
            "grid/clock-disagrees",
            "error",
            f"the network is told sigma {worst[0]:.3f} where the sample's is {worst[1]:.3f}: "
            f"{run.scheduler} derives timesteps and sigmas differently",
            "pass neither timesteps nor sigmas of your own to a shifting scheduler; sample with "
            "FewStepPipeline, whose table is final",
            {"told_sigma": [t for t, _ in off], "measured_sigma": [m for _, m in off]},
        )


GRID_CHECKS: tuple[Check, ...] = (
    NotTrained(),
    DoubleShift(),
    ShiftTerminal(),
    NeverSeesNoise(),
    ClockDisagrees(),
    LastCallClean(),
)


def _by_hand(trained: Sequence[float], shift: float, total: float) -> str:
    """What a stock scheduler must be given to end up at these timesteps."""
    unshifted = [shift_sigma(t / total, 1.0 / shift) for t in trained]
    advice = f"pass sigmas={[round(u, 4) for u in unshifted]} where the pipeline takes them"
    count, second = len(trained), trained[1] / total
    needed = second / ((count - 1) * (1.0 - second)) if second < 1.0 else shift
    even = [total * shift_sigma(1.0 - i / count, needed) for i in range(count)]
    if not are_near(even, trained, total):
        return advice
    return (
        f"{advice}, else use UniPCMultistepScheduler(use_flow_sigmas=True, "
        f"flow_shift={needed:.4g}, solver_order=1)"
    )
