"""Checks of the scheduler's settings: habits that suit many steps and spoil few. No torch."""

from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import Check, Subject
from fewstep.doctor.trained import shown_grid

SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
IGNORES_SPACING = ("LCMScheduler", "TCDScheduler")
WITH_MEMORY = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")


class OtherSpacing(Check):
    """Karras, exponential, beta or lu spacing of sigmas on a few-step model."""

    def examine(self, subject: Subject) -> Finding | None:
        scheduler = subject.scheduler
        if scheduler is None or not subject.is_few_step:
            return None
        used = [name for name in SPACINGS if scheduler.config.get(name)]
        if not used:
            return None
        seen = subject.run.timesteps if subject.run else ()
        return Finding(
            "sampler/other-spacing",
            "error",
            f"{scheduler.class_name} runs with {used[0]}=True, which moves the calls to "
            f"{shown_grid(seen)}: few-step models know only the timesteps they were trained at",
            f"rebuild it: {scheduler.class_name}.from_config(pipe.scheduler.config, "
            f"{used[0]}=False), or sample with FewStepPipeline",
            {"settings": used, "seen": list(seen)},
        )


class SpacingNotRead(Check):
    """A setting that looks right and is never read."""

    def examine(self, subject: Subject) -> Finding | None:
        scheduler = subject.scheduler
        if scheduler is None or scheduler.class_name not in IGNORES_SPACING:
            return None
        spacing = scheduler.config.get("timestep_spacing", "leading")
        if spacing == "leading":
            return None
        seen = subject.run.timesteps if subject.run else ()
        return Finding(
            "sampler/setting-not-read",
            "note",
            f"{scheduler.class_name} never reads timestep_spacing={spacing!r}; it calls the "
            f"network at {shown_grid(seen)} all the same",
            "pass timesteps=[...] to the pipeline, or sample with FewStepPipeline",
            {"timestep_spacing": spacing, "seen": list(seen)},
        )


class SolverWithMemory(Check):
    """A multistep solver, which reads earlier calls into the next step."""

    def examine(self, subject: Subject) -> Finding | None:
        scheduler, recipe, grid = subject.scheduler, subject.recipe, subject.grid
        if scheduler is None or recipe is None or (grid is not None and grid.solver):
            return None
        order = scheduler.config.get("solver_order", 1)
        if scheduler.class_name not in WITH_MEMORY or order == 1:
            return None
        return Finding(
            "sampler/multistep",
            "warning",
            f"{scheduler.class_name} with solver_order={order} corrects each step by the calls "
            "before it; this model was trained for plain steps",
            f"rebuild it: {scheduler.class_name}.from_config(pipe.scheduler.config, "
            "solver_order=1), or sample with FewStepPipeline",
            {"solver_order": order},
        )


SAMPLER_CHECKS: tuple[Check, ...] = (OtherSpacing(), SolverWithMemory(), SpacingNotRead())
