"""How student and critic are parameterised, from a run's settings."""

from fewstep.trainer.methods.method import Frame
from fewstep.trainer.parameters.policies import (
    FullPolicy,
    LoradPolicy,
    LoraPolicy,
    ParameterPolicy,
    SmallerPolicy,
)
from fewstep.trainer.parameters.two_time import TwoTimePolicy


def student_policy(frame: Frame) -> ParameterPolicy:
    """How the student is parameterised."""
    lora, targets = frame.config.lora, targets_of(frame)
    if lora.student == "lora":
        return LoraPolicy(targets, lora.rank, lora.alpha)
    if lora.student == "two-time":
        return TwoTimePolicy(LoraPolicy(targets, lora.rank, lora.alpha))
    if lora.student == "lorad":
        return LoradPolicy(targets, lora.rank)
    if lora.student == "full":
        return FullPolicy(lora.trainable)
    return SmallerPolicy("transformer_blocks", lora.keep_blocks)


def critic_policy(frame: Frame) -> ParameterPolicy:
    """How the critic is: like the student, at its own rank, or a full copy."""
    lora = frame.config.lora
    if lora.critic == "full":
        return FullPolicy()
    if lora.critic == "lorad":
        return LoradPolicy(targets_of(frame), lora.critic_rank)
    alpha = lora.alpha * lora.critic_rank / lora.rank
    return LoraPolicy(targets_of(frame), lora.critic_rank, alpha)


def targets_of(frame: Frame) -> tuple[str, ...]:
    """Layers that get an adapter: the config's, or the family's own."""
    return frame.config.lora.targets or frame.backbone.lora_targets
