"""Checks of the recipe itself: that there is one, and that it can be served here. No torch."""

from fewstep.adapters.families import KNOWN
from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import Check, Subject


class NoRecipe(Check):
    """Nothing says how this model wants to be sampled."""

    def examine(self, subject: Subject) -> Finding | None:
        if subject.recipe is not None:
            return None
        if not subject.files and not subject.loras and not subject.is_few_step:
            return None  # a many-step base on its own needs none
        has_lora = bool(subject.files or subject.loras)
        known = ""
        if subject.candidates:
            known = f"; in the zoo it may be {' or '.join(subject.candidates)}"
        return Finding(
            "recipe/none",
            "error" if subject.files else "warning" if has_lora else "note",
            "nothing says how this model wants to be sampled: steps, grid, sampler, guidance and "
            f"LoRA weight are guesses{known}",
            "give its recipe (--recipe), or find it with: fewstep zoo search",
            {"looked_at": subject.recipe_places, "candidates": list(subject.candidates)},
        )


class Unverified(Check):
    """A recipe that was found with a warning."""

    def examine(self, subject: Subject) -> Finding | None:
        if subject.recipe_warning is None:
            return None
        return Finding(
            "recipe/unverified",
            "note",
            subject.recipe_warning,
            "compare its numbers with what the authors say (fewstep zoo show)",
            {"source": subject.recipe_source},
        )


class NotServed(Check):
    """A recipe this pipeline cannot obey."""

    def examine(self, subject: Subject) -> Finding | None:
        if subject.refusal is None:
            return None
        return Finding(
            "recipe/not-served",
            "error",
            subject.refusal,
            "give the pipeline and the step count the recipe was made for",
        )


class OtherFamily(Check):
    """A lone file whose names contradict its recipe; on a pipeline its shapes decide."""

    def examine(self, subject: Subject) -> Finding | None:
        recipe = subject.recipe
        if recipe is None or subject.class_name:
            return None
        wanted = recipe.base.family
        for file in subject.files:
            if file.family != wanted and {file.family, wanted} <= {*KNOWN}:
                return Finding(
                    "recipe/other-family",
                    "warning",
                    f"the recipe is for {wanted}, but the layers of {file.header.path.name} are "
                    f"named as in {file.family}",
                    "give the recipe of this adapter, or the adapter of this recipe",
                    {"recipe": wanted, "file": file.family},
                )
        return None


class ProbeFailed(Check):
    """A call that stock diffusers cannot make."""

    def examine(self, subject: Subject) -> Finding | None:
        run = subject.as_called
        if run is None or run.error is None:
            return None
        return Finding(
            "pipeline/call-failed",
            "error",
            f"the call fails with {run.scheduler}: {run.error}",
            "mend the call's arguments" + ("; under the recipe it runs" if _runs(subject) else ""),
            {"error": run.error},
        )


class OtherExperts(Check):
    """Two networks that share the steps otherwise than trained."""

    def examine(self, subject: Subject) -> Finding | None:
        run, ours = subject.run, subject.with_fewstep
        if run is None or ours is None or ours.error is not None or len(subject.networks) != 2:
            return None
        seen, trained = ([s.calls[0].component for s in r.steps if s.calls] for r in (run, ours))
        if seen == trained or run.starts_from_image:
            return None
        first = subject.networks[0].component
        return Finding(
            "experts/other-split",
            "error",
            f"{first} makes {seen.count(first)} of {len(seen)} calls, but it was made for "
            f"{trained.count(first)} of {len(trained)}",
            "sample with FewStepPipeline; the grid decides who makes which call",
            {"seen": seen, "trained": trained},
        )


RECIPE_CHECKS: tuple[Check, ...] = (
    NoRecipe(),
    Unverified(),
    NotServed(),
    OtherFamily(),
    ProbeFailed(),
    OtherExperts(),
)


def _runs(subject: Subject) -> bool:
    return subject.with_fewstep is not None and subject.with_fewstep.error is None
