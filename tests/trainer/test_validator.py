"""Stages that cannot work are refused with the reason; those that can pass."""

import dataclasses

import pytest

from fewstep.errors import ConfigError
from fewstep.trainer.components.critics import Critic, DenoisingTerm
from fewstep.trainer.components.grids import FixedGrid, RandomGrid
from fewstep.trainer.components.kernels import Interval
from fewstep.trainer.components.real_uid import RealUid
from fewstep.trainer.components.rollouts import OffPath, RealLatents, StudentRollout
from fewstep.trainer.components.score_identity import ScoreIdentity
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import Guided, Mixture
from fewstep.trainer.components.terms import ByExpert, Term, Weighted
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import ConditionRoute, PhaseRoute
from fewstep.trainer.run import Run
from fewstep.trainer.stages import Stage
from fewstep.trainer.validator import validate
from tests.trainer.analytic import exact_path, exact_run

ROLLOUT = StudentRollout(FixedGrid(exact_path(2)))
CRITIC = Critic(ROLLOUT)
TWIN = Guided(role=Role.TWIN)


def stage_of(*terms: Term, critic: Critic | None = None, **more: object) -> Stage:
    weighted = tuple(Weighted(term) for term in terms)
    return Stage(name="one", num_steps=1, terms=weighted, critic=critic, **more)  # pyright: ignore


def check(*stages: Stage, run: Run | None = None) -> None:
    run = exact_run(Dmd2(), num_steps=2) if run is None else run
    validate(run.frame, stages, run.setting)


@pytest.mark.parametrize(
    "stage",
    [
        stage_of(ScoreDifference(ROLLOUT, Guided()), critic=CRITIC),
        stage_of(ScoreDifference(ROLLOUT, Guided(), critic=TWIN), DenoisingTerm(ROLLOUT)),
        stage_of(
            ScoreDifference(ROLLOUT, Guided(), critic=TWIN, kernel=Interval()),
            DenoisingTerm(ROLLOUT, kernel=Interval()),
        ),
        stage_of(DenoisingTerm(ROLLOUT, role=Role.STUDENT)),
    ],
    ids=["critic", "twin", "interval twin", "no comparison"],
)
def test_stages_that_work_pass(stage: Stage) -> None:
    check(stage)


def test_a_method_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no stage with steps"):
        check()


@pytest.mark.parametrize(
    "term",
    [
        ScoreDifference(ROLLOUT, Guided()),
        ScoreIdentity(ROLLOUT),
        RealUid(ROLLOUT),
        ByExpert((ScoreDifference(ROLLOUT, Guided()),)),
        ScoreDifference(
            ROLLOUT, Guided(), critic=Mixture((TWIN, Guided(role=Role.CRITIC)), (0.5, 0.5))
        ),
    ],
    ids=["difference", "identity", "uid", "by expert", "half a twin"],
)
def test_a_comparison_needs_a_critic(term: Term) -> None:
    with pytest.raises(ConfigError, match="compares with a critic and trains none"):
        check(stage_of(term, DenoisingTerm(ROLLOUT)))


def test_a_comparison_with_the_twin_needs_a_term_that_trains_it() -> None:
    term = ScoreDifference(ROLLOUT, Guided(), critic=TWIN)
    with pytest.raises(ConfigError, match="no term trains that; add a DenoisingTerm"):
        check(stage_of(term))
    with pytest.raises(ConfigError, match="no term trains that"):
        check(stage_of(term, critic=CRITIC))
    other = DenoisingTerm(ROLLOUT, role=Role.TWIN.expert(1))
    with pytest.raises(ConfigError, match="no term trains that"):
        check(stage_of(term, other))


@pytest.mark.parametrize("kind", [ScoreIdentity, RealUid])
def test_a_gradient_through_the_critic_cannot_have_a_twin(
    kind: type[ScoreIdentity] | type[RealUid],
) -> None:
    term = kind(ROLLOUT, role=Role.TWIN)
    with pytest.raises(ConfigError, match=f"{kind.__name__}.*would train a twin"):
        check(stage_of(term, DenoisingTerm(ROLLOUT)))


def test_a_twin_has_no_updates_of_its_own() -> None:
    critic = dataclasses.replace(CRITIC, role=Role.TWIN)
    with pytest.raises(ConfigError, match="as if it had parameters of its own"):
        check(stage_of(ScoreDifference(ROLLOUT, Guided()), critic=critic))


@pytest.mark.parametrize("is_twin", [False, True])
def test_transitions_need_a_critic_of_transitions(is_twin: bool) -> None:
    critic = TWIN if is_twin else Guided(role=Role.CRITIC)
    term = ScoreDifference(ROLLOUT, Guided(), critic=critic, kernel=Interval())
    stage = stage_of(term, DenoisingTerm(ROLLOUT)) if is_twin else stage_of(term, critic=CRITIC)
    with pytest.raises(ConfigError, match="give the critic the interval kernel too"):
        check(stage)


def test_real_latents_are_announced_and_there() -> None:
    term = DenoisingTerm(RealLatents(FixedGrid(exact_path(1))), role=Role.STUDENT)
    with pytest.raises(ConfigError, match="does not draw any; set uses_data"):
        check(stage_of(term))
    run = exact_run(Dmd2(), num_steps=2)
    check(stage_of(term, uses_data=True), run=run)
    object.__setattr__(run.setting, "latents", None)
    with pytest.raises(ConfigError, match="pass --data.images FOLDER"):
        check(stage_of(term, uses_data=True), run=run)


def test_random_grids_are_deterministic_and_of_one_size() -> None:
    rollout = StudentRollout(RandomGrid(exact_path(4).schedule, 1, 4))
    for around in (rollout, OffPath(rollout)):
        stage = stage_of(ScoreDifference(around, Guided()), critic=CRITIC)
        check(stage)
        with pytest.raises(ConfigError, match="random grids are rolled out by deterministic"):
            check(stage, run=exact_run(Dmd2(), num_steps=2, stochasticity=1.0))


def test_routes_fit_their_stages() -> None:
    run = exact_run(Dmd2(), num_steps=2)
    stage = stage_of(ScoreDifference(ROLLOUT, Guided()), critic=CRITIC)
    object.__setattr__(run.setting, "route", PhaseRoute((1.0, 0.5, 0.0)))
    with pytest.raises(ConfigError, match="names none; set expert"):
        check(stage, run=run)
    check(dataclasses.replace(stage, expert=1), run=run)
    object.__setattr__(run.setting, "route", ConditionRoute(((0,), ())))
    with pytest.raises(ConfigError, match="a group without prompts; use fewer groups"):
        check(stage, run=run)
    with pytest.raises(ConfigError, match="routes by prompt"):
        check(dataclasses.replace(stage, uses_data=True), run=run)
