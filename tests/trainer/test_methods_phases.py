"""phased-dmd, tdm, disback, dmdr, uni-dad and msd on the exact Gaussian: where they end and why."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow
from fewstep.recipe import Grid
from fewstep.trainer.adapter import build_recipe
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.critics import ImportanceWeight, TransitionWeight
from fewstep.trainer.components.grids import AnnealedExit, FixedGrid
from fewstep.trainer.components.kernels import Interval, OwnPrediction
from fewstep.trainer.components.preferences import PsoTerm
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.score_matching import TeacherScoreMatching
from fewstep.trainer.components.signals import HuberPull, ScoreDifference
from fewstep.trainer.components.targets import AlongPath, Guided
from fewstep.trainer.components.terms import ByExpert
from fewstep.trainer.config import GridConfig, LoraConfig, TrainConfig
from fewstep.trainer.data.latent_book import LatentBook
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.data.prompt_groups import (
    centroids_of,
    embedding_groups,
    label_groups,
    prompt_embeddings,
)
from fewstep.trainer.draws import Draws
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.adversarial import GanConfig
from fewstep.trainer.methods.disback import Disback, RecordConfig
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.dmdr import Dmdr, RewardConfig
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.msd import Msd
from fewstep.trainer.methods.phased_dmd import PhasedDmd
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.tdm import Tdm
from fewstep.trainer.methods.uni_dad import TARGET_TEACHER, DomainConfig, UniDad
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import PhaseRoute
from fewstep.trainer.run import Run
from fewstep.trainer.stages import Copy, Reset, Stage
from tests.trainer.analytic import (
    CPU,
    MEAN,
    VARIANCE,
    ExactBackbone,
    exact_context,
    exact_path,
    exact_run,
    exact_setting,
    finish,
    learner,
    moments,
)


def match(**settings: Any) -> MatchConfig:
    """Rates for a linear student."""
    rates = MatchConfig(
        num_steps=120,
        learning_rate=0.02,
        critic_learning_rate=0.04,
        critic_updates=3,
        critic_warmup=20,
    )
    return dataclasses.replace(rates, **settings)


FEW = match(num_steps=4, critic_updates=1, critic_warmup=2)


@pytest.mark.parametrize(
    ("method", "num_steps"),
    [
        (PhasedDmd(match=match()), 2),
        (PhasedDmd(match=match(), start="teacher"), 2),
        (Tdm(match=match()), 2),
        (Disback(match=match(), record=RecordConfig(num_steps=30, num_stops=3)), 1),
        (Dmdr(match=match(num_steps=250, critic_updates=2), reward=RewardConfig(weight=0.0)), 1),
    ],
    ids=lambda value: value.facts.name if isinstance(value, Method) else None,
)
def test_the_student_reaches_the_teachers_mean_and_variance(method: Method, num_steps: int) -> None:
    run = exact_run(method, num_steps=num_steps, batch_size=64)
    assert moments(run)[1] < 0.2 * VARIANCE
    mean, variance = moments(finish(run))
    assert mean == pytest.approx(MEAN, abs=0.1)
    assert variance == pytest.approx(VARIANCE, rel=0.25)


def term_of(stage: Stage) -> ScoreDifference:
    (first, *_) = stage.terms
    assert isinstance(first.term, ScoreDifference)
    return first.term


def test_phases_are_trained_one_after_the_other_with_a_fresh_critic() -> None:
    run = exact_run(PhasedDmd(match=FEW), num_steps=4, batch_size=8)
    cast, students = run.setting.cast, (Role("student-0"), Role("student-1"))
    first, second = run.stages
    assert (first.expert, second.expert) == (0, 1)
    assert first.actions == ()
    assert second.actions[0] == Reset(Role.CRITIC)
    while run.stage_index == 0:
        advance(run)
    done = [p.clone() for p in cast.parameters(students[0])]
    assert all((p == 0.0).all() for n, p in cast.named(students[1]) if "lora_B" in n)
    while not run.is_done:
        advance(run)
    for mine, before in zip(cast.parameters(students[0]), done, strict=True):
        assert torch.equal(mine, before)  # frozen while the next is trained
    assert any((p != 0.0).any() for n, p in cast.named(students[1]) if "lora_B" in n)


def test_an_expert_starts_as_the_one_before_it_or_as_the_teacher() -> None:
    for method, copies in (
        (PhasedDmd(match=FEW, start="previous"), 2),
        (PhasedDmd(match=FEW, start="teacher"), 0),
    ):
        run = exact_run(method, num_steps=2, batch_size=8)
        assert sum(isinstance(action, Copy) for action in run.stages[1].actions) == copies


@pytest.mark.parametrize(("num_steps", "phases"), [(4, 2), (4, 3), (5, 2), (8, 3)])
def test_every_step_is_in_one_phase_and_its_exit_stays_there(num_steps: int, phases: int) -> None:
    run = exact_run(PhasedDmd(match=FEW, num_phases=phases), num_steps=num_steps, batch_size=4)
    route = run.setting.route
    assert isinstance(route, PhaseRoute)
    owners = [route.expert_at(level.sigma) for level in run.frame.path.levels[:-1]]
    assert owners == sorted(owners)
    assert set(owners) == set(range(phases))
    for expert, stage in enumerate(run.stages):
        rollout: Any = term_of(stage).rollout
        exits = {
            rollout.exit.draw(Draws(0, step, 0, range(1), CPU), "rollout", num_steps)
            for step in range(60)
        }
        assert exits == {index for index, owner in enumerate(owners) if owner == expert}


def test_the_recipe_gives_every_step_to_the_expert_that_learned_it() -> None:
    run = exact_run(PhasedDmd(match=FEW, num_phases=3), num_steps=4, batch_size=4)
    recipe = build_recipe(run.frame, {}, 12)
    assert [expert.adapter for expert in recipe.experts] == ["phase-0", "phase-1", "phase-2"]
    (grid,) = recipe.grids
    assert isinstance(grid, Grid)
    route = run.setting.route
    assert isinstance(route, PhaseRoute)
    assert grid.experts == tuple(route.expert_at(sigma) for sigma in grid.sigmas[:-1])
    assert recipe.experts[0].sigma_high == 1.0
    assert recipe.experts[-1].sigma_low == 0.0


def test_tdm_has_its_papers_laws_or_the_exact_ones() -> None:
    (own,) = exact_run(Tdm(match=FEW), num_steps=2, batch_size=4).stages
    assert term_of(own).pull == HuberPull(1e-3)
    assert own.critic is not None
    assert own.critic.kernel == OwnPrediction(Interval())
    assert own.critic.weight == ImportanceWeight()
    (exact,) = exact_run(Tdm(match=FEW, critic_target="exact"), num_steps=2, batch_size=4).stages
    assert exact.critic is not None
    assert exact.critic.kernel == term_of(exact).kernel == Interval()
    assert exact.critic.weight == TransitionWeight()


def test_disback_walks_its_record_backwards_to_the_teacher() -> None:
    method = Disback(match=FEW, record=RecordConfig(num_steps=8, num_stops=3))
    run = exact_run(method, batch_size=8)
    cast, kept = run.setting.cast, {}
    while run.stage_index == 0:
        advance(run)
        kept[run.step] = [p.clone() for p in cast.parameters(Role.CRITIC)]
    assert all((p == 0.0).all() for n, p in cast.named(Role.STUDENT) if "lora_B" in n)
    for stop, step in (("path-1", 2), ("path-2", 4), ("path-3", 6)):
        for mine, critic in zip(cast.parameters(Role(stop)), kept[step], strict=True):
            assert torch.equal(mine, critic)
    target = term_of(run.stages[1]).target
    assert isinstance(target, AlongPath)
    roles = [stop.role for stop in target.stops if isinstance(stop, Guided)]
    assert roles == [Role("path-3"), Role("path-2"), Role("path-1"), Role.TEACHER]


def test_dmdr_exits_early_at_first_and_evenly_at_last() -> None:
    """P(first of 2 steps) = 1 - 2^-(1 + a) at the start, 1/2 at the end."""
    law = AnnealedExit(3.0)
    for progress, expected in ((0.0, 1.0 - 0.5**4), (1.0, 0.5)):
        drawn = [
            law.draw(Draws(0, step, 0, range(1), CPU), "x", 2, progress) for step in range(4000)
        ]
        assert drawn.count(0) / 4000 == pytest.approx(expected, abs=0.02)
        assert set(drawn) == {0, 1}


def test_dmdr_without_its_own_mechanisms_is_dmd2() -> None:
    """Same draws but for the exit, which is the only step here: the same weights bit for bit."""
    plain = Dmdr(match=FEW, reward=RewardConfig(weight=0.0), strength=0.0, beta_a=0.0)
    mine, other = (
        finish(exact_run(method, batch_size=16)).setting.cast.parameters(Role.STUDENT)
        for method in (plain, Dmd2(match=FEW))
    )
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_dmdrs_reference_is_the_student_after_its_cold_start() -> None:
    reward = RewardConfig(climb="pairs", cold_start=0.5)
    method = Dmdr(match=FEW, reward=reward)
    run = exact_run(method, num_steps=2, batch_size=4, stochasticity=1.0)
    (stage,) = run.stages
    assert stage.actions == (Copy(Role("reference"), Role.STUDENT, at=0.5),)
    assert isinstance(stage.terms[1].term, PsoTerm)
    assert stage.terms[1].weight_at(0.49) == 0.0
    assert stage.terms[1].weight_at(0.6) == pytest.approx(reward.weight)


def test_a_dual_domain_student_ends_between_its_two_teachers() -> None:
    """Equal variances: the mixture of scores is the score of the mixture of means."""
    domain = DomainConfig(num_steps=200, learning_rate=0.02, null_share=0.0)
    method = UniDad(
        match=match(num_steps=150), domain=domain, gan=GanConfig(weight=0.0), source_share=0.25
    )
    run = exact_run(method, batch_size=64)
    assert run.setting.latents is not None
    (bucket,) = run.setting.latents.buckets
    moved = dataclasses.replace(bucket, parts=tuple(part + 1.0 for part in bucket.parts))
    run.setting = dataclasses.replace(run.setting, latents=LatentBook((moved,)))
    while run.stage_index == 0:
        advance(run)
    assert all((p == 0.0).all() for n, p in run.setting.cast.named(Role.STUDENT) if "lora_B" in n)
    mean, variance = moments(finish(run))
    assert mean == pytest.approx(MEAN + 0.75, abs=0.12)
    assert variance == pytest.approx(VARIANCE, rel=0.3)
    assert TARGET_TEACHER.name in run.setting.cast.policies


class ShiftedBackbone(ExactBackbone):
    """Every prompt's data are the exact Gaussian moved by its embedding."""

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        shift = condition.sequence[:, 0, :1, None, None]
        alpha = 1.0 - timestep.reshape(-1, 1, 1, 1) / 1000.0
        return network(sample - alpha * shift, timestep) + shift


def prompt_book(shifts: list[float], labels: tuple[str, ...] = ()) -> PromptBook:
    embeddings = torch.tensor(shifts).reshape(-1, 1, 1)
    null = Condition(torch.zeros(1, 1, 1))
    return PromptBook(
        tuple(f"p{i}" for i in range(len(shifts))), Condition(embeddings), null, labels
    )


def msd_run(method: Msd, **settings: Any) -> Run:
    return exact_run(
        method, backbone=ShiftedBackbone(), book=prompt_book([0.0, 4.0, 0.2, 4.2]), **settings
    )


def test_every_student_of_msd_reaches_its_own_groups_moments() -> None:
    run = finish(msd_run(Msd(match=match(num_steps=200)), batch_size=64))
    for prompt, shift in ((0, 0.0), (1, 4.0), (2, 0.2), (3, 4.2)):
        latents = run.sample([prompt] * 300, 123)
        assert latents.mean().item() == pytest.approx(MEAN + shift, abs=0.12)
        assert latents.var().item() == pytest.approx(VARIANCE, rel=0.3)


def test_an_update_of_msd_touches_one_student_and_its_critic_only() -> None:
    run = msd_run(Msd(match=FEW), batch_size=8)
    cast = run.setting.cast
    for parameter in (*cast.parameters(Role("critic-0")), *cast.parameters(Role("critic-1"))):
        parameter.data.add_(0.1)  # a critic that is the teacher moves nobody
    for role in ("student", "critic"):
        before = {k: [p.clone() for p in cast.parameters(Role(f"{role}-{k}"))] for k in (0, 1)}
        draws = Draws(run.config.seed, run.step, 1 if role == "critic" else 0, range(8), CPU)
        expert = run.expert_of_update(draws)
        run.update_critic(1) if role == "critic" else run.update_student()
        for k in (0, 1):
            pairs = zip(before[k], cast.parameters(Role(f"{role}-{k}")), strict=True)
            changed = any(not torch.equal(old, new) for old, new in pairs)
            assert changed == (k == expert)


def test_each_student_of_msd_is_compared_with_its_own_critic() -> None:
    (stage,) = msd_run(Msd(match=FEW), batch_size=4).stages
    term = stage.terms[0].term
    assert isinstance(term, ByExpert)
    critics = [part.critic for part in term.parts if isinstance(part, ScoreDifference)]
    assert critics == [Guided(role=Role("critic-0")), Guided(role=Role("critic-1"))]


def test_smaller_students_of_msd_first_learn_to_denoise_as_the_teacher_does() -> None:
    run = msd_run(Msd(match=FEW), batch_size=4)
    lora = dataclasses.replace(run.config.lora, student="smaller")
    frame = dataclasses.replace(run.frame, config=dataclasses.replace(run.config, lora=lora))
    first, second = Msd(match=FEW).stages(frame)
    assert first.critic is None
    assert first.rotates_experts
    assert second.critic is not None
    (alone,) = Msd(match=FEW, score_matching_steps=0).stages(frame)
    assert alone == second


def test_teacher_score_matching_is_zero_for_the_teacher_and_teaches_it_otherwise() -> None:
    setting = exact_setting()
    term = TeacherScoreMatching(StudentRollout(FixedGrid(exact_path(2))))
    assert term.loss(exact_context(setting))[0].item() == 0.0
    parameters = setting.cast.parameters(Role.STUDENT)
    for parameter in parameters:
        parameter.data.add_(0.3)
    before = term.loss(exact_context(setting))[0].item()
    optimizer = learner(parameters, 0.02, beta1=0.9)
    for step in range(60):
        optimizer.update([lambda s=step: term.loss(exact_context(setting, step=s))], 1.0)
    assert term.loss(exact_context(setting))[0].item() < 0.05 * before


def test_groups_by_embedding_are_what_the_router_finds() -> None:
    book = prompt_book([0.0, 4.0, 0.2, 4.2, 9.0])
    groups = embedding_groups(book, 3)
    assert {frozenset(group) for group in groups} == {
        frozenset({0, 2}),
        frozenset({1, 3}),
        frozenset({4}),
    }
    assert prompt_embeddings(book).shape == (5, 1)
    found = sorted(centroids_of(book, groups).flatten().tolist())
    assert found == pytest.approx([0.1, 4.1, 9.0])
    with pytest.raises(ConfigError, match="cannot make 3 groups"):
        embedding_groups(prompt_book([1.0, 1.0, 2.0]), 3)


def test_groups_by_label_are_refused_where_embeddings_would_mix_them() -> None:
    apart = prompt_book([0.0, 4.0, 0.2, 4.2], ("a", "b", "a", "b"))
    assert label_groups(apart, 2) == ((0, 2), (1, 3))
    mixed = prompt_book([0.0, 4.0, 0.2, 4.2], ("a", "a", "a", "b"))
    with pytest.raises(ConfigError, match="'p1' of group 0 would be routed to group 1"):
        label_groups(mixed, 2)
    with pytest.raises(ConfigError, match="2 different groups"):
        label_groups(apart, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": PhasedDmd(), "grid": GridConfig(also_steps=(2,))}, "leave it out"),
        ({"method": PhasedDmd(num_phases=3), "grid": GridConfig(num_steps=2)}, "as many steps"),
        ({"method": PhasedDmd(), "lora": LoraConfig(student="full")}, "a LoRA per phase"),
        ({"method": Tdm(), "grid": GridConfig(stochasticity=1.0)}, "set it to 0"),
        ({"method": Dmdr(reward=RewardConfig(climb="pairs"))}, "draw noise"),
        ({"method": Msd(), "lora": LoraConfig(student="lorad")}, "lora or smaller"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_the_toys_two_step_grid_splits_in_the_middle() -> None:
    levels = exact_path(2).levels
    assert [level.sigma for level in levels] == [1.0, 0.5, 0.0]
    assert Flow().level(500.0).sigma == 0.5
