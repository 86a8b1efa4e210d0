"""Checks of guidance: how many passes each step takes, and which arguments do nothing. No torch."""

from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import Check, Subject

TWICE = 1.5
"""More network rows per image and step than this are a second, unconditional pass."""
OR_OURS = ", or sample with FewStepPipeline"


class NotOff(Check):
    """A second pass on a model that was made for none."""

    def examine(self, subject: Subject) -> Finding | None:
        run, facts, recipe = subject.run, subject.guidance, subject.recipe
        if run is None or facts is None or run.passes < TWICE or not subject.is_few_step:
            return None
        if recipe is not None and recipe.guidance.mode in ("cfg", "true_cfg"):
            return None
        made_for = "this model was made for guidance off"
        if recipe is None:
            made_for = "most few-step models are made for guidance off"
        return Finding(
            "guidance/not-off",
            "warning" if recipe is None else "error",
            f"each step takes {run.passes:g} network passes because {facts.said}, but {made_for}: "
            "twice the time, burnt pictures",
            f"pass {facts.argument}={facts.off:g}" + ("" if recipe is None else OR_OURS),
            {"passes": run.passes, "argument": facts.argument, "value": facts.value},
        )


class OneIsNotOff(Check):
    """The classes whose guidance is off at 0, and which run a second pass at 1."""

    def examine(self, subject: Subject) -> Finding | None:
        run, facts = subject.run, subject.guidance
        if run is None or facts is None or facts.value != 1.0 or facts.off != 0.0:
            return None
        if run.passes < TWICE or facts.argument is None:
            return None
        return Finding(
            "guidance/one-is-not-off",
            "error" if subject.recipe is not None else "warning",
            f"{facts.argument}=1 is not off in {subject.class_name}: it computes "
            "cond + 1 * (cond - uncond), a guidance of 2 for twice the time",
            f"pass {facts.argument}=0",
            {"passes": run.passes, "value": facts.value},
        )


class NotOn(Check):
    """Guidance that a recipe asks for and the call does not do."""

    def examine(self, subject: Subject) -> Finding | None:
        run, facts, recipe = subject.run, subject.guidance, subject.recipe
        if run is None or facts is None or recipe is None or run.passes >= TWICE:
            return None
        guidance = recipe.guidance
        if guidance.mode not in ("cfg", "true_cfg") or guidance.scale == 1.0:
            return None
        missing = facts.needs_negative and not facts.has_negative
        cause = "it guides only beside a negative prompt" if missing else facts.said
        return Finding(
            "guidance/not-on",
            "error",
            f"this model was made for guidance {guidance.scale:g}, but each step takes one pass: "
            f"{cause}",
            "pass "
            + ", ".join(f"{k}={v:g}" for k, v in facts.wanted.items())
            + (" and a negative_prompt" if missing else "")
            + OR_OURS,
            {"passes": run.passes, "wanted": dict(facts.wanted)},
        )


class OtherScale(Check):
    """A scale other than the recipe's."""

    def examine(self, subject: Subject) -> Finding | None:
        facts, recipe, run = subject.guidance, subject.recipe, subject.run
        if facts is None or recipe is None or run is None:
            return None
        for name, wanted in facts.wanted.items():
            value = facts.values.get(name)
            is_pass = name == facts.argument
            both_off = is_pass and value is not None and max(value, wanted) <= facts.off
            if value is None or value == wanted or both_off:
                continue
            if is_pass and (run.passes < TWICE or wanted <= facts.off):
                continue  # told by NotOn or NotOff
            return Finding(
                "guidance/other-scale",
                "warning",
                f"{name} is {value:g}, but this model was made for {wanted:g} "
                f"(guidance {recipe.guidance.mode})",
                f"pass {name}={wanted:g}{OR_OURS}",
                {"argument": name, "value": value, "wanted": wanted},
            )
        return None


class NegativeInert(Check):
    """A negative prompt that nothing reads."""

    def examine(self, subject: Subject) -> Finding | None:
        run, facts = subject.run, subject.guidance
        if run is None or facts is None or not facts.has_negative or run.passes >= TWICE:
            return None
        return Finding(
            "guidance/negative-has-no-effect",
            "warning",
            "the negative prompt has no effect: each step takes one network pass, without it",
            "leave the negative prompt out, and say what you want in the prompt",
            {"passes": run.passes},
        )


GUIDANCE_CHECKS: tuple[Check, ...] = (
    NotOff(),
    OneIsNotOff(),
    NotOn(),
    OtherScale(),
    NegativeInert(),
)
