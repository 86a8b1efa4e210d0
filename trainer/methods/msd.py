"""MSD: several students, each for a group of prompts, each with a critic of its own."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from fewstep.errors import ConfigError
from fewstep.recipe import FewStepRecipe
from fewstep.recipe import Route as RecipeRoute
from fewstep.trainer.components.score_matching import TeacherScoreMatching
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import Guided
from fewstep.trainer.components.terms import ByExpert, Weighted
from fewstep.trainer.config_checks import at_least
from fewstep.trainer.data.prompt_groups import embedding_groups, label_groups
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import ConditionRoute
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig

SHOWN_PROMPTS = 16
"""Prompts of a group that the recipe lists for people."""


@dataclass(frozen=True, kw_only=True)
class Msd(Method):
    """Song et al. 2024: multi-student distillation."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="msd",
        summary="one student per group of prompts; the prompt's embedding chooses",
        paper="MSD, arXiv:2410.23274",
        needs="prompts",
        num_steps=1,
        artefact="one LoRA per group in one file, with the groups' centroids",
        equation="grad of dmd2 of student k against critic k, on prompts of group k only",
        deviations="groups by k-means of prompt embeddings; no GAN stage; students take turns on "
        "one base; score matching of smaller students on their own samples, not on pictures",
    )
    match: MatchConfig = field(
        default_factory=lambda: MatchConfig(learning_rate=5e-4, critic_learning_rate=1e-3)
    )
    num_students: int = 2
    """Students; each gets as many of the updates."""
    group_by: Literal["embedding", "label"] = "embedding"
    """embedding: k-means of prompt embeddings. label: whole groups of the prompts file, refused
    where embeddings would not tell them apart."""
    score_matching_steps: int = 200
    """lora.student smaller: steps in which the students learn to denoise as the teacher does,
    before they are distilled (0.2 of a budget); 0 skips them."""

    def __post_init__(self) -> None:
        at_least("num-students", self.num_students, 2)
        at_least("score-matching-steps", self.score_matching_steps, 0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match = self.match
        rollout = match.rollout(frame)
        terms = tuple(
            ScoreDifference(
                rollout,
                guided_teacher(frame),
                critic=Guided(role=Role.CRITIC.expert(k)),
                tau=match.tau,
                normaliser=match.normaliser,
            )
            for k in range(self.num_students)
        )
        matching = Stage(
            name="multi-student matching",
            num_steps=match.num_steps,
            terms=(Weighted(ByExpert(terms)),),
            learning_rate=match.learning_rate,
            betas=match.betas,
            critic=match.critic(rollout),
            rotates_experts=True,
        )
        if frame.config.lora.student != "smaller" or self.score_matching_steps == 0:
            return (matching,)
        return self._score_matching(frame), matching

    def route(self, frame: Frame) -> ConditionRoute:
        if self.group_by == "label":
            return ConditionRoute(label_groups(frame.book, self.num_students))
        return ConditionRoute(
            embedding_groups(frame.book, self.num_students, seed=frame.config.seed)
        )

    def recipe(self, recipe: FewStepRecipe, frame: Frame) -> FewStepRecipe:
        groups = self.route(frame).groups
        routes = tuple(
            RecipeRoute(
                adapter=f"group-{k}",
                prompts=tuple(frame.book.prompts[row] for row in group[:SHOWN_PROMPTS]),
            )
            for k, group in enumerate(groups)
        )
        return dataclasses.replace(recipe, routes=routes)

    def check(self, config: "TrainConfig") -> None:
        if config.lora.student not in ("lora", "smaller"):
            raise ConfigError(
                f"msd trains LoRAs or smaller students, but lora.student is "
                f"{config.lora.student}; set it to lora or smaller"
            )

    def _score_matching(self, frame: Frame) -> Stage:
        rollout = self.match.rollout(frame)
        terms = tuple(
            TeacherScoreMatching(rollout, Role.STUDENT.expert(k)) for k in range(self.num_students)
        )
        return Stage(
            name="teacher score matching",
            num_steps=self.score_matching_steps,
            share=0.25,
            terms=(Weighted(ByExpert(terms)),),
            learning_rate=5e-4,
            rotates_experts=True,
        )
