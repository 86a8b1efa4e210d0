"""Checks of the noise: does the seed reach the step, how much is fresh, what is left. No torch."""

from fewstep.doctor.finding import Finding
from fewstep.doctor.seen import SeenRun
from fewstep.doctor.subject import Check, Subject
from fewstep.recipe_plan import plan_steps

SAME = 0.15
"""Shares of old noise nearer than this are one policy: small samples measure them roughly."""
LEFT = 0.1
"""Noise of a result that is still finished. Stock tables of Stable Diffusion end at 0.03, and the
first noise of deviation 1 in place of 0.998 adds as much again."""


class NoSteps(Check):
    """A call that never reaches the network: image to image at few steps and low strength."""

    def examine(self, subject: Subject) -> Finding | None:
        run = subject.as_called
        if run is None or run.error is not None or run.steps:
            return None
        strength = subject.arguments.get("strength")
        why = "" if strength is None else f" at strength {strength:g} and these steps"
        return Finding(
            "grid/no-steps",
            "error",
            f"{subject.class_name} makes no network call{why}: the picture comes back as it was",
            "sample with FewStepPipeline, which always takes at least one trained step, or raise "
            "strength to at least 1 / num_inference_steps",
            {"strength": strength, "num_steps": subject.num_steps},
        )


class SeedIgnored(Check):
    """The same seed, another picture."""

    def examine(self, subject: Subject) -> Finding | None:
        run = subject.run
        if run is None or run.is_repeatable is not False:
            return None
        return Finding(
            "noise/seed-ignored",
            "error",
            f"two runs with one seed differ: {subject.class_name} does not hand its generator to "
            f"{run.scheduler}.step, which draws fresh noise from torch's global stream",
            "sample with FewStepPipeline, which binds the generator to the scheduler",
            {"is_repeatable": False},
        )


class OtherPolicy(Check):
    """More or less fresh noise than the model was trained with."""

    def examine(self, subject: Subject) -> Finding | None:
        run, recipe = subject.run, subject.recipe
        if run is None or recipe is None or run.starts_from_image or not run.is_complete:
            return None
        seen, wanted = _kept(run), _wanted(subject)
        if len(seen) != len(wanted) or not seen:
            return None
        worst = max(range(len(seen)), key=lambda i: abs(seen[i] - wanted[i]))
        if abs(seen[worst] - wanted[worst]) <= SAME + run.spread:
            return None
        gamma = recipe.sampler.stochasticity
        fix = "sample with FewStepPipeline"
        if run.scheduler == "TCDScheduler":
            fix = f"pass eta={gamma:g} (the pipelines' default of 0 wins over TCD's own), or {fix}"
        return Finding(
            "noise/wrong-stochasticity",
            "error",
            f"after step {worst + 1} {_share(seen[worst])} of the noise is kept, but this model "
            f"was made to keep {_share(wanted[worst])} (stochasticity {gamma:g})",
            fix,
            {"kept": list(seen), "wanted": list(wanted), "stochasticity": gamma},
        )


class LeftInResult(Check):
    """Noise in the finished picture."""

    def examine(self, subject: Subject) -> Finding | None:
        run = subject.run
        if run is None or run.leftover is None or run.leftover <= LEFT + run.spread:
            return None
        last = run.steps[-1]
        is_added = last.kept is not None and last.kept < 1.0 - SAME
        if run.starts_from_image and not is_added:
            return None  # the image itself is in the sample; its deviation is no noise
        cause = "adds noise after the last step" if is_added else "stops before the noise is gone"
        return Finding(
            "noise/left-in-result",
            "error",
            f"the finished latents still hold noise of deviation {run.leftover:.2f}: "
            f"{run.scheduler} {cause}",
            "sample with FewStepPipeline"
            + ("" if is_added else ", or start where the noise is: timestep_spacing='trailing'"),
            {"leftover": run.leftover, "is_added": is_added},
        )


NOISE_CHECKS: tuple[Check, ...] = (NoSteps(), SeedIgnored(), OtherPolicy(), LeftInResult())


def _kept(run: SeenRun) -> list[float]:
    """Share of the noise kept by each step but the last, which ends clean or nearly so."""
    return [1.0 if step.kept is None else step.kept for step in run.steps[:-1]]


def _wanted(subject: Subject) -> list[float]:
    """The same as the recipe plans it: for zero data, old noise over all noise."""
    recipe, grid = subject.recipe, subject.grid
    if recipe is None or grid is None:
        return []
    kept = []
    for planned in plan_steps(recipe, grid.num_steps)[:-1]:
        fresh = abs(planned.weights.noise) / planned.following.sigma
        kept.append(max(1.0 - fresh * fresh, 0.0) ** 0.5)
    return kept


def _share(kept: float) -> str:
    return "none" if kept < SAME else "all" if kept > 1.0 - SAME / 2 else f"{kept:.0%}"
