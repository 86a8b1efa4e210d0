"""A smaller student first imitates its teacher, because it cannot start as a copy of it."""

from fewstep.trainer.components.feature_distillation import BlockKd, FeatureKd, block_pairs
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.methods.players import student_policy
from fewstep.trainer.parameters.policies import SmallerPolicy
from fewstep.trainer.stages import Stage

SHARE = 0.3
"""Of a budget, for the imitation of all students."""
LEARNING_RATE = 5e-4


def with_imitation(frame: Frame, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """A method's stages, after a stage of feature distillation where the student is smaller.

    Each kept block learns what the run of blocks it stands for does (alone, on the teacher's
    inputs), and all of them together what the teacher predicts on the student's own path.

    Raises:
        ConfigError: The base has no list of blocks to choose from.
    """
    policy, num_steps = student_policy(frame), frame.config.lora.imitation_steps
    if not isinstance(policy, SmallerPolicy) or num_steps == 0:
        return stages
    rollout = StudentRollout(frame.grid)
    pairs = block_pairs(policy, frame.backbone.denoiser)
    experts = frame.config.method.route(frame).experts()
    rest = sum(stage.share for stage in stages)
    firsts = tuple(
        Stage(
            name="imitation",
            num_steps=num_steps,
            share=rest * SHARE / (1.0 - SHARE) / len(experts),
            terms=(Weighted(FeatureKd(rollout, pairs)), Weighted(BlockKd(rollout, pairs))),
            learning_rate=LEARNING_RATE,
            expert=expert,
        )
        for expert in experts
    )
    return (*firsts, *stages)
