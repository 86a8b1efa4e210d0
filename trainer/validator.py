"""Combinations that cannot work are refused before anything is trained, with the reason.

Rules that need one setting only are in the settings themselves, rules of one method in its `check`;
here are those that tie stages, data, grids and parameters together.
"""

from fewstep.errors import ConfigError
from fewstep.trainer.components.critics import DenoisingTerm
from fewstep.trainer.components.grids import GridLaw, RandomGrid
from fewstep.trainer.components.kernels import Interval
from fewstep.trainer.components.real_uid import RealUid
from fewstep.trainer.components.rollouts import OffPath, Rollout, StudentRollout
from fewstep.trainer.components.score_identity import ScoreIdentity
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import Guided, Mixture, Solved, Target
from fewstep.trainer.components.terms import ByExpert, Term
from fewstep.trainer.context import Setting
from fewstep.trainer.methods.method import Frame
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import ConditionRoute, PhaseRoute
from fewstep.trainer.stages import Stage


def validate(frame: Frame, stages: tuple[Stage, ...], setting: Setting) -> None:
    """Check the stages of a method against each other and the run.

    Raises:
        ConfigError: A rule is broken; the message says which and why.
    """
    name = frame.config.method.facts.name
    if not stages:
        raise ConfigError(f"method {name} has no stage with steps; give one of them some")
    for stage in stages:
        _check_critic(stage, frame)
        _check_data(stage, setting, name)
        _check_steps(stage, frame)
        _check_route(stage, setting, name)


def _check_critic(stage: Stage, frame: Frame) -> None:
    lora, critic = frame.config.lora, stage.critic
    if critic is not None and critic.keep < 1.0:
        if lora.student != lora.critic or lora.critic_rank != lora.rank:
            raise ConfigError(
                f"IDA mixes the critic's parameters with the student's, but the student is "
                f"{lora.student} of rank {lora.rank} and the critic {lora.critic} of rank "
                f"{lora.critic_rank}; make them alike or set ida to 1"
            )
    _check_twins(stage)
    terms = _terms(stage)
    asks = [role for term in terms for role in _critics_of(term)]
    if critic is None and any(role.clock > 0 for role in asks):
        raise ConfigError(
            f"stage {stage.name!r} compares with a critic and trains none; give it one"
        )
    kernels = [term.kernel for term in terms if isinstance(term, ScoreDifference)]
    if any(isinstance(kernel, Interval) for kernel in kernels):
        followers = [term for term in terms if isinstance(term, DenoisingTerm)]
        kept = [term.kernel for term in followers if term.role.clock < 0]
        kept += [critic.kernel] if critic is not None else []
        if not all(isinstance(kernel, Interval) for kernel in kept):
            raise ConfigError(
                f"stage {stage.name!r} asks at transitions and trains its critic on plain "
                "re-noising; give the critic the interval kernel too"
            )


def _check_twins(stage: Stage) -> None:
    """A twin is the student at negative time, so only a term of the student's can train it."""
    terms = _terms(stage)
    if stage.critic is not None and stage.critic.role.clock < 0:
        raise ConfigError(
            f"stage {stage.name!r} updates a twin as if it had parameters of its own; train it "
            "with a DenoisingTerm beside the student's other terms"
        )
    trained = {term.role for term in terms if isinstance(term, DenoisingTerm)}
    for term in terms:
        twins = {role for role in _critics_of(term) if role.clock < 0}
        if twins and not isinstance(term, ScoreDifference):
            raise ConfigError(
                f"{type(term).__name__} of stage {stage.name!r} sends the student's gradient "
                "through its critic, which would train a twin; give it a critic of its own"
            )
        if not twins <= trained:
            raise ConfigError(
                f"stage {stage.name!r} compares with the student's twin and no term trains that; "
                "add a DenoisingTerm of the same role"
            )


def _terms(stage: Stage) -> list[Term]:
    """A stage's terms, those of its experts one by one."""
    found: list[Term] = []
    for part in stage.terms:
        found += part.term.parts if isinstance(part.term, ByExpert) else (part.term,)
    return found


def _critics_of(term: Term) -> tuple[Role, ...]:
    """The roles a term takes for a critic."""
    if isinstance(term, ScoreIdentity | RealUid):
        return (term.role,)
    return _asked(term.critic) if isinstance(term, ScoreDifference) else ()


def _asked(target: Target) -> tuple[Role, ...]:
    if isinstance(target, Mixture):
        return tuple(role for part in target.parts for role in _asked(part))
    return (target.role,) if isinstance(target, Guided | Solved) else ()


def _check_data(stage: Stage, setting: Setting, name: str) -> None:
    needs = any(part.term.needs_data for part in stage.terms)
    if stage.critic is not None:
        needs = needs or stage.critic.rollout.needs_data
        needs = needs or any(extra.needs_data for extra in stage.critic.extras)
    if needs and not stage.uses_data:
        raise ConfigError(
            f"stage {stage.name!r} of {name} compares with real latents but does not draw any; "
            "set uses_data"
        )
    if stage.uses_data and setting.latents is None:
        raise ConfigError(f"{name} compares with real pictures; pass --data.images FOLDER")
    if stage.uses_data and isinstance(setting.route, ConditionRoute):
        raise ConfigError(
            f"{name} routes by prompt, which cannot be combined with terms on real data yet; "
            "choose a method that needs prompts only"
        )


def _check_steps(stage: Stage, frame: Frame) -> None:
    for rollout in _rollouts(stage):
        grid: GridLaw | None = rollout.grid if isinstance(rollout, StudentRollout) else None
        if isinstance(grid, RandomGrid) and frame.path.stochasticity > 0.0:
            raise ConfigError(
                "random grids are rolled out by deterministic steps, but grid.stochasticity is "
                f"{frame.path.stochasticity:g}: training and inference would differ; set it to 0"
            )
        if isinstance(grid, RandomGrid) and frame.path.sizes:
            raise ConfigError("random grids have no sizes; leave the scale ladder out")


def _check_route(stage: Stage, setting: Setting, name: str) -> None:
    if isinstance(setting.route, PhaseRoute) and stage.trains_student and stage.expert is None:
        raise ConfigError(
            f"{name} has an expert per phase, but stage {stage.name!r} names none; set expert"
        )
    if isinstance(setting.route, ConditionRoute) and any(not g for g in setting.route.groups):
        raise ConfigError(f"{name} has a group without prompts; use fewer groups")


def _rollouts(stage: Stage) -> list[Rollout]:
    found: list[Rollout] = []
    for part in stage.terms:
        if isinstance(part.term, ScoreDifference):
            rollout = part.term.rollout
            found.append(rollout.around if isinstance(rollout, OffPath) else rollout)
    return found
