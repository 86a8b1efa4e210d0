"""Checks of what happens when this pipeline is saved. No torch."""

from fewstep.doctor.finding import Finding
from fewstep.doctor.subject import Check, Subject


class LoraAttached(Check):
    """LoRA layers that `save_pretrained` writes under names nothing reads back."""

    def examine(self, subject: Subject) -> Finding | None:
        adapted = [network.component for network in subject.networks if network.loras]
        if not adapted or subject.is_wrapped:  # FewStepPipeline refuses to save that
            return None
        return Finding(
            "saving/lora-attached",
            "warning",
            f"{' and '.join(adapted)} has LoRA layers: save_pretrained writes base_layer and lora_ "
            "keys, and loading that folder gives those layers random weights",
            "fuse_lora() and unload_lora_weights() before saving, or save with FewStepPipeline",
            {"components": adapted},
        )


class ForeignScheduler(Check):
    """A scheduler class that a Hub repository cannot name."""

    def examine(self, subject: Subject) -> Finding | None:
        scheduler = subject.scheduler
        if scheduler is None or scheduler.is_of_diffusers or subject.is_wrapped:
            return None
        return Finding(
            "saving/foreign-scheduler",
            "warning",
            f"{scheduler.class_name} is not a class of diffusers: model_index.json would name a "
            "module, and loading the folder from the Hub is a ValueError",
            "save with FewStepPipeline, which writes the stock scheduler and the recipe beside it",
            {"scheduler": scheduler.class_name},
        )


SAVING_CHECKS: tuple[Check, ...] = (LoraAttached(), ForeignScheduler())
