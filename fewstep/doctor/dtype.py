"""Checks of number formats: what overflows, and which look-ups fail after rounding. No torch."""

from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import Check, Subject


class VaeOverflow(Check):
    """SDXL's VAE in float16: black pictures."""

    def examine(self, subject: Subject) -> Finding | None:
        vae = subject.vae
        if vae is None or not vae.overflows:
            return None
        return Finding(
            "dtype/vae-overflow",
            "error",
            f"the VAE decodes normal noise in {vae.dtype} to NaN or infinity: black pictures",
            "pipe.vae.to(torch.float32), or use the VAE that was made for float16 "
            "(sdxl-vae-fp16-fix)",
            {"dtype": vae.dtype, "force_upcast": vae.force_upcast},
        )


class NetworkNotFinite(Check):
    """A denoiser that answers NaN or infinity."""

    def examine(self, subject: Subject) -> Finding | None:
        for run in (subject.as_called, subject.with_fewstep):
            calls = [call for step in run.steps for call in step.calls] if run else []
            bad = next((call for call in calls if not call.is_finite), None)
            if bad is not None:
                return Finding(
                    "dtype/network-not-finite",
                    "error",
                    f"{bad.component} answers NaN or infinity when told timestep {bad.told:g}",
                    "load it in bfloat16 or float32, and check the files for damage",
                    {"component": bad.component, "told": bad.told},
                )
        return None


class TimestepRounded(Check):
    """A timestep that lost digits on the way to a scheduler that compares with ==."""

    def examine(self, subject: Subject) -> Finding | None:
        run = subject.as_called
        if run is None:
            return None
        lost = [step.timestep for step in run.steps if not step.is_in_table]
        if not lost:
            return None
        return Finding(
            "dtype/timestep-rounded",
            "error" if run.error is not None else "warning",
            f"{run.scheduler}.step was told timestep {lost[0]:g}, which is not in its table: it "
            "was rounded on the way, and stock schedulers look timesteps up with ==",
            "call set_begin_index(0) before the loop, keep timesteps in float32, or sample with "
            "FewStepPipeline, which looks up the nearest",
            {"timesteps": lost},
        )


DTYPE_CHECKS: tuple[Check, ...] = (VaeOverflow(), NetworkNotFinite(), TimestepRounded())
