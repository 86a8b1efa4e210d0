"""Phased DMD: one expert per interval of noise, matched on what is noisier than its end."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from fewstep.errors import ConfigError
from fewstep.recipe import Expert, FewStepRecipe
from fewstep.trainer.components.critics import TransitionWeight
from fewstep.trainer.components.grids import Exit, FixedGrid
from fewstep.trainer.components.kernels import Interval
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.taus import AboveEnd, TauLaw, Uniform
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import at_least, within
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig, guided_teacher
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import PhaseRoute
from fewstep.trainer.stages import Action, Copy, Reset, Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PhasedDmd(Method):
    """Fan et al. 2025: phases of the signal-to-noise range, scores matched inside subintervals."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="phased-dmd",
        summary="an expert per phase of noise, matched where its own steps end, one after another",
        paper="Phased DMD, arXiv:2510.27684",
        needs="prompts",
        num_steps=4,
        artefact="one LoRA per phase",
        equation="grad of dmd2 at x_tau = a x_s + b e, tau in (s, 1]; critic target "
        "x_s / alpha_s - (alpha_tau sigma_s^2 / (alpha_s^2 b)) e",
        deviations="a random step of the phase is matched at its own end; critic error weighted by "
        "b^2 / sigma^2 instead of a clamped 1 / b^2; normaliser as in DMD",
    )
    match: MatchConfig = field(default_factory=MatchConfig)
    """Of every phase: num_steps counts for each of them."""
    num_phases: int = 2
    """Experts; the grid's steps are shared among them as evenly as they go."""
    start: Literal["teacher", "previous"] = "previous"
    """What an expert starts as: the teacher, or the expert before it."""
    margin: float = 0.02
    """How far above the end of a step teacher and critic are asked, share of the schedule."""

    def __post_init__(self) -> None:
        at_least("num-phases", self.num_phases, 2)
        within("margin", self.margin, 0.001, 0.2)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        if frame.backbone.experts:
            raise ConfigError(
                f"{frame.config.model} has networks for parts of the noise already, so phased-dmd "
                "cannot cut it into phases; choose a method with one student"
            )
        return tuple(self._stage(frame, phase) for phase in range(self.num_phases))

    def route(self, frame: Frame) -> PhaseRoute:
        levels = frame.path.levels
        starts = self._first_steps(frame.path.num_steps)
        return PhaseRoute((*(levels[first].sigma for first in starts), 0.0))

    def recipe(self, recipe: FewStepRecipe, frame: Frame) -> FewStepRecipe:
        sigmas = [level.sigma for level in frame.path.levels]
        starts = self._first_steps(frame.path.num_steps)
        # between two steps: hosts give a boundary to the noisier expert, the route to the cleaner
        between = [(sigmas[first - 1] + sigmas[first]) / 2.0 for first in starts[1:]]
        bounds = [1.0, *between, 0.0]
        experts = tuple(
            Expert(adapter=f"phase-{k}", sigma_high=bounds[k], sigma_low=bounds[k + 1])
            for k in range(self.num_phases)
        )
        route = self.route(frame)
        (grid,) = recipe.grids
        chosen = tuple(route.expert_at(sigma) for sigma in grid.sigmas[:-1])
        return dataclasses.replace(
            recipe, experts=experts, grids=(dataclasses.replace(grid, experts=chosen),)
        )

    def check(self, config: "TrainConfig") -> None:
        if config.grid.also_steps:
            raise ConfigError(
                f"phased-dmd cuts one grid into phases, but grid.also-steps is "
                f"{config.grid.also_steps}; leave it out"
            )
        if config.grid.num_steps < self.num_phases:
            raise ConfigError(
                f"{self.num_phases} phases need as many steps, but grid.num-steps is "
                f"{config.grid.num_steps}; raise it or lower method.num-phases"
            )
        if config.lora.student != "lora":
            raise ConfigError(
                f"phased-dmd saves a LoRA per phase, but lora.student is {config.lora.student}; "
                "leave it at lora"
            )

    def _first_steps(self, num_steps: int) -> list[int]:
        """The first step of every phase."""
        return [round(k * num_steps / self.num_phases) for k in range(self.num_phases)]

    def _stage(self, frame: Frame, phase: int) -> Stage:
        match, num_steps = self.match, frame.path.num_steps
        bounds = [*self._first_steps(num_steps), num_steps]
        exits = Exit(bounds[phase], bounds[phase + 1] - 1)
        rollout = StudentRollout(FixedGrid(frame.path), exits)
        kernel = Interval(self.margin)
        tau = TauLaw(
            AboveEnd(self.margin), Uniform(match.tau_shift), low=match.tau_min, high=match.tau_max
        )
        term = ScoreDifference(
            rollout, guided_teacher(frame), kernel=kernel, tau=tau, normaliser=match.normaliser
        )
        critic = dataclasses.replace(
            match.critic(rollout, kernel=kernel), tau=tau, weight=TransitionWeight()
        )
        return Stage(
            name=f"phase {phase}",
            num_steps=match.num_steps,
            terms=(Weighted(term),),
            learning_rate=match.learning_rate,
            betas=match.betas,
            critic=critic,
            expert=phase,
            actions=self._actions(phase),
        )

    def _actions(self, phase: int) -> tuple[Action, ...]:
        if phase == 0:
            return ()
        fresh = Reset(Role.CRITIC)
        if self.start == "teacher":
            return (fresh,)
        both = (Role.STUDENT, Role.AVERAGE)
        return (fresh, *(Copy(role.expert(phase), role.expert(phase - 1)) for role in both))
