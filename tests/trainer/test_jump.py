"""Jump terms: exact maps of a Gaussian have no loss; times, moves and starts are as they say."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fewstep import sampling
from fewstep.errors import ConfigError
from fewstep.heads.two_time import current_gap
from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.components.average_velocity import (
    AverageVelocity,
    Derivative,
    FiniteDifference,
    ForwardMode,
)
from fewstep.trainer.components.distances import L1, L2, AdaptiveL2, Distance, PseudoHuber
from fewstep.trainer.components.flow_view import (
    flow_state,
    flow_time,
    jump,
    jump_levels,
    level_rates,
    velocity_of,
)
from fewstep.trainer.components.grids import FixedGrid, even_path
from fewstep.trainer.components.jump import EndSpace, JumpTerm, Space, VelocitySpace, X0Space
from fewstep.trainer.components.jump_starts import DataStart, NoiseStart, StudentStart, TeacherStart
from fewstep.trainer.components.jump_times import (
    AboveEnd,
    Anywhere,
    BelowStart,
    ClockTimes,
    JumpTimes,
    MergedSteps,
    Place,
    SegmentTimes,
    StepTimes,
    UnionTimes,
)
from fewstep.trainer.components.moves import (
    FixedScale,
    Jumped,
    Ode,
    Sde,
    UniformScale,
    guided_answer,
    own_jump,
    two_time_x0,
)
from fewstep.trainer.components.rollouts import StudentRollout
from fewstep.trainer.components.trajectory import TeacherEnd
from fewstep.trainer.context import Setting, StepContext
from fewstep.trainer.levels import Levels
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import SingleRoute
from tests.trainer.analytic import (
    MEAN,
    SHAPE,
    VARIANCE,
    ExactBackbone,
    exact_book,
    exact_context,
    exact_latents,
    exact_setting,
)
from tests.trainer.oracles import mixture_setting

SCHEDULES = [Flow(), Vp()]
NAMES = ["flow", "vp"]


def smooth_levels(schedule: NoiseSchedule, timestep: Tensor) -> Levels:
    """Levels at any real timestep, differentiable in it; timestep 0 is clean data."""
    if isinstance(schedule, Flow):
        sigma = timestep / schedule.num_train_timesteps
        alpha = 1.0 - sigma
    else:
        assert isinstance(schedule, Vp)
        table = torch.from_numpy(schedule.sigmas()).to(timestep.dtype)
        index = timestep.detach().long().clamp(max=len(table) - 2)
        sigma = table[index] + (timestep - index) * (table[index + 1] - table[index])
        sigma = torch.where(timestep <= 0.0, 0.0, sigma)
        alpha = (1.0 - sigma.square()).sqrt()
    column = (-1, 1, 1, 1)
    return Levels(timestep, alpha.reshape(column), sigma.reshape(column))


def spread(levels: Levels) -> Tensor:
    """Standard deviation of the exact marginal."""
    return (levels.alpha.square() * VARIANCE + levels.sigma.square()).sqrt()


class Map(nn.Module):
    """x0 of the exact map to the time it is told, or of the exact posterior where told nothing."""

    def __init__(self, schedule: NoiseSchedule, *, to_clean: bool = False) -> None:
        super().__init__()
        self.schedule = schedule
        self.to_clean = to_clean
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.bend = 0.0

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        gap, x = current_gap(), sample.double()
        timestep = timestep.double()
        now = smooth_levels(self.schedule, timestep)
        end = torch.zeros_like(timestep) if self.to_clean or gap is None else timestep - gap
        there = smooth_levels(self.schedule, end)
        bend = self.bend * torch.sin(x + now.sigma - 0.5 * there.sigma)
        if gap is None:
            pull = now.alpha * VARIANCE / spread(now).square()
            return MEAN + pull * (x - now.alpha * MEAN) + self.offset
        reached = there.alpha * MEAN + spread(there) / spread(now) * (x - now.alpha * MEAN)
        ratio = there.sigma / now.sigma
        x0 = (reached - ratio * x) / (there.alpha - now.alpha * ratio)
        pull = now.alpha * VARIANCE / spread(now).square()
        here = MEAN + pull * (x - now.alpha * MEAN)  # a step of no length: the posterior mean
        is_apart = (now.sigma - there.sigma).abs() > 1e-6
        return torch.where(is_apart, x0, here) + bend + self.offset


class Deaf(nn.Module):
    """The exact posterior, whatever it is told."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        now = smooth_levels(self.schedule, timestep.double())
        pull = now.alpha * VARIANCE / spread(now).square()
        return MEAN + pull * (sample.double() - now.alpha * MEAN) + self.offset


class MapBackbone(ExactBackbone):
    """The exact teacher on any schedule, and a student that is an exact map of it."""

    def __init__(self, schedule: NoiseSchedule, *, to_clean: bool = False) -> None:
        super().__init__()
        self.schedule = schedule
        self.deaf = Deaf(schedule)
        self.student = Map(schedule, to_clean=to_clean)
        self.own_networks[Role.STUDENT.name] = self.student

    @property
    def denoiser(self) -> nn.Module:
        return self.deaf


def map_context(
    schedule: NoiseSchedule, *, to_clean: bool = False, count: int = 256, step: int = 0
) -> StepContext:
    backbone = MapBackbone(schedule, to_clean=to_clean)
    cast = Cast(backbone.denoiser, {})
    setting = Setting(
        backbone, cast, exact_book(backbone), exact_latents(4096), (SHAPE,), SingleRoute()
    )
    return exact_context(setting, count=count, step=step, uses_data=True)


def loss_of(term: JumpTerm | AverageVelocity, context: StepContext) -> float:
    return term.loss(context)[0].item()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_a_jump_is_the_step_and_stays_where_it_is(schedule: NoiseSchedule) -> None:
    context = map_context(schedule, count=2)
    first, second = even_path(schedule, 4).levels[:2]
    sample, x0 = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    now, following = context.levels(first), context.levels(second)
    wanted = sampling.step(sample, x0, first, second, None, second)
    torch.testing.assert_close(jump(sample, x0, now, following), wanted)
    assert torch.equal(own_jump(context, Role.STUDENT, sample, following, following), sample)
    clean = jump_levels(schedule, torch.zeros(2))
    assert torch.equal(own_jump(context, Role.STUDENT, sample, clean, clean), sample)
    torch.testing.assert_close(jump(sample, x0, now, clean), x0)
    state = flow_state(sample, now)
    moved = state - (flow_time(now) - flow_time(following)) * velocity_of(x0, sample, now)
    torch.testing.assert_close(moved, flow_state(wanted, following))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_the_exact_consistency_function_has_no_loss_in_the_limit(schedule: NoiseSchedule) -> None:
    found = []
    for steps in (8, 32, 128):
        term = JumpTerm(
            DataStart(), SegmentTimes(even_path(schedule, steps)), Ode(), Jumped(), L2()
        )
        found.append(loss_of(term, map_context(schedule, to_clean=True)))
        posterior = map_context(schedule)
        posterior.backbone.own_networks[Role.STUDENT.name] = Deaf(schedule)
        if steps == 32:
            assert loss_of(term, posterior) > 5.0 * found[1]
    assert found[0] > 8.0 * found[1] > 64.0 * found[2]
    assert found[2] < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_two_jumps_of_the_exact_flow_map_are_one(schedule: NoiseSchedule) -> None:
    term = JumpTerm(DataStart(), ClockTimes(Anywhere()), Jumped(), Jumped())
    assert loss_of(term, map_context(schedule)) < 1e-8
    wrong = map_context(schedule)
    wrong.backbone.own_networks[Role.STUDENT.name] = Deaf(schedule)
    assert loss_of(term, wrong) > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_the_end_of_the_exact_flow_map_follows_the_teacher(schedule: NoiseSchedule) -> None:
    """Lagrangian: X(x_t; t -> s) is X(x_t; t -> s + delta) and a teacher step."""
    found = []
    for delta in (0.2, 0.05, 0.0125):
        term = JumpTerm(DataStart(), ClockTimes(AboveEnd(delta)), Jumped(), Ode())
        found.append(loss_of(term, map_context(schedule)))
    assert found[0] > 8.0 * found[1] > 64.0 * found[2]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_the_exact_average_velocity_solves_the_eulerian_identity(schedule: NoiseSchedule) -> None:
    times = ClockTimes(BelowStart(0.0), low=0.1)

    def residual(derivative: Derivative) -> float:
        term = AverageVelocity(DataStart(), times, derivative=derivative, distance=L2())
        return loss_of(term, map_context(schedule))

    found = [residual(FiniteDifference(delta)) for delta in (0.08, 0.02, 0.005)]
    assert found[0] > 4.0 * found[1] > 16.0 * found[2]
    assert residual(ForwardMode()) < 1e-5
    assert found[2] < 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_finite_differences_are_the_derivative(schedule: NoiseSchedule) -> None:
    """On a student that is bent away from the exact map."""
    gradients = []
    for derivative in (FiniteDifference(0.004), ForwardMode()):
        context = map_context(schedule)
        student = context.backbone.own_networks[Role.STUDENT.name]
        assert isinstance(student, Map)
        student.bend = 0.3
        times = ClockTimes(BelowStart(0.0), low=0.1, equal=0.2).draw(context)
        sample = DataStart().sample(context, times.start)
        x0 = two_time_x0(context, Role.STUDENT, sample, times.start, times.end).detach()
        teacher = context.backbone.x0(Role.TEACHER, sample, times.start, context.condition)
        answer = velocity_of(x0, sample, times.start)
        slope = derivative.of(context, sample, times, teacher.detach(), answer)
        gradients.append(slope * (flow_time(times.start) - flow_time(times.end)))
    difference, exact = gradients
    assert float(exact.square().mean()) > 0.01
    assert float((difference - exact).square().mean() / exact.square().mean()) < 2e-3


def test_the_target_of_a_round_is_two_steps_in_closed_form() -> None:
    """Of a Gaussian a step multiplies x - alpha m by ratio + (alpha_s - alpha_t ratio) pull."""
    context = map_context(Flow(), count=32)
    times = MergedSteps(even_path(Flow(), 8, shift=3.0)).draw(context)
    sample = DataStart().sample(context, times.start)
    reached = Ode().move(context, sample, times.stops)
    offset = sample - times.start.alpha * MEAN
    for now, following in zip(times.stops, times.stops[1:], strict=False):
        ratio = following.sigma / now.sigma
        pull = now.alpha * VARIANCE / spread(now).square()
        offset = (ratio + (following.alpha - now.alpha * ratio) * pull) * offset
    torch.testing.assert_close(reached, times.end.alpha * MEAN + offset, rtol=1e-4, atol=1e-5)
    assert len(times.stops) == 3
    student = {round(level.timestep) for level in even_path(Flow(), 4, shift=3.0).levels}
    assert {round(t) for t in times.start.timestep.tolist()} <= student  # every other rung


@pytest.mark.parametrize("is_random", [False, True])
def test_jumps_end_in_their_segment(is_random: bool) -> None:
    ladder = even_path(Vp(), 8)
    clock = [level.timestep for level in ladder.levels[:-1]] + [0.0]
    context = map_context(Vp(), count=512)
    times = SegmentTimes(ladder, 4, is_random).draw(context)
    seen = set()
    for t, u, s in zip(
        times.start.timestep.tolist(),
        times.middle.timestep.tolist(),
        times.end.timestep.tolist(),
        strict=True,
    ):
        index, end = clock.index(t), clock.index(s)
        assert clock.index(u) == index + 1
        edge = (index // 2 + 1) * 2
        assert index < end <= edge if is_random else end == edge
        seen.add((index, end))
    assert len(seen) == (12 if is_random else 8)
    assert float(times.end.sigma.min()) == 0.0
    with pytest.raises(ConfigError, match="no 3 equal segments"):
        SegmentTimes(ladder, 3)


def test_union_targets_are_near_and_on_the_grids() -> None:
    context = map_context(Flow(), count=400)
    targets = tuple(even_path(Flow(), n) for n in (4, 5, 6))
    times = UnionTimes(even_path(Flow(), 40), targets, reach=0.26).draw(context)
    union = {round(level.timestep, 2) for path in targets for level in path.levels}
    ends = {round(float(s), 2) for s in times.end.timestep}
    assert ends <= union
    assert len(ends) > 5
    gap = times.middle.timestep - times.end.timestep
    assert float(gap.min()) >= 0.0
    assert float(gap.max()) <= 260.0


def test_clock_times() -> None:
    context = map_context(Flow(), count=2000)
    times = ClockTimes(Anywhere(), low=0.1, reach=0.5, equal=0.25).draw(context)
    t, u, s = (part.sigma.flatten() for part in (times.start, times.middle, times.end))
    assert bool((t >= u).all() and (u >= s).all())
    assert float(t.min()) >= 0.1 - 1e-6
    assert float((t - s).max()) <= 0.5 + 1e-6
    assert 0.2 < float((t == s).float().mean()) < 0.31
    fixed = ClockTimes(Anywhere(), low=1.0).draw(context)
    assert bool((fixed.start.sigma == 1.0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_the_sde_keeps_the_marginal_and_is_the_ode_without_noise(schedule: NoiseSchedule) -> None:
    context = map_context(schedule, count=4000)
    high, low = jump_levels(schedule, torch.tensor([0.7, 0.4])).timestep
    now, following = (smooth_levels(schedule, t.repeat(4000)) for t in (high, low))
    sample = DataStart().sample(context, now)
    plain = Ode(substeps=4).move(context, sample, (now, following))
    silent = Sde(0.0, substeps=4).move(context, sample, (now, following))
    torch.testing.assert_close(silent, plain)
    noisy = Sde(0.3, substeps=24).move(context, sample, (now, following))
    assert abs(float((noisy - plain).square().mean())) > 0.01
    assert float(noisy.std()) == pytest.approx(float(spread(following)[0]), rel=0.06)


def test_a_start_on_the_teachers_trajectory_has_the_datas_marginal() -> None:
    context = map_context(Flow(), count=3000)
    now = smooth_levels(Flow(), torch.linspace(300.0, 300.0, 3000))
    sample = TeacherStart(32).sample(context, now)
    assert float(sample.mean()) == pytest.approx(0.7 * MEAN, abs=0.03)
    assert float(sample.std()) == pytest.approx(float(spread(now)[0]), rel=0.05)
    noise = NoiseStart().sample(context, smooth_levels(Flow(), torch.full((3000,), 1000.0)))
    assert float(noise.std()) == pytest.approx(1.0, abs=0.03)


def test_guidance_scales_per_sample() -> None:
    context = exact_context(mixture_setting(), count=8)
    sample = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    now = smooth_levels(Flow(), torch.full((8,), 500.0))
    fixed = guided_answer(context, Role.TEACHER, sample, now, 2.5)
    many = guided_answer(context, Role.TEACHER, sample, now, torch.full((8,), 2.5))
    torch.testing.assert_close(fixed, many)
    scales = UniformScale(1.0, 3.0).draw(context)
    assert scales.shape == (8,)
    assert 1.0 <= float(scales.min()) < float(scales.max()) < 3.0
    assert FixedScale(2.0).draw(context) == 2.0


def test_the_students_own_steps_are_a_jump_term() -> None:
    """SFD's term is the jump term from the student's trajectory, with many teacher steps."""
    setting = exact_setting()
    for parameter in setting.cast.parameters(Role.STUDENT):
        parameter.data.add_(0.1)
    grid, losses = FixedGrid(even_path(Flow(), 3)), []
    place = Place(grid)
    terms = (
        TeacherEnd(StudentRollout(grid, name="jump"), 4, 1.0, L2()),
        JumpTerm(StudentStart(place), StepTimes(place, 4), Ode()),
    )
    for term in terms:
        losses.append(term.loss(exact_context(setting, step=2))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 1e-4


@pytest.mark.parametrize(
    ("space", "wanted"),
    [
        (EndSpace(), lambda u, x: x[2]),
        (X0Space(), lambda u, x: x[1]),
        (VelocitySpace(), lambda u, x: x[0]),
    ],
    ids=["end", "x0", "velocity"],
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_spaces(
    schedule: NoiseSchedule, space: Space, wanted: Callable[[Tensor, list[Tensor]], Tensor]
) -> None:
    """Each is the difference of the quantity it names, for two predictions at one sample."""
    now, end = (smooth_levels(schedule, torch.tensor([t])) for t in (700.0, 200.0))
    sample, one, other = torch.randn(3, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    reached = [jump(sample, x0, now, end) for x0 in (one, other)]
    velocities = [velocity_of(x0, sample, now) for x0 in (one, other)]
    named = [velocities[1] - velocities[0], one - other, reached[0] - reached[1]]
    found = space.factor(JumpTimes((now,), end)) * (reached[0] - reached[1])
    torch.testing.assert_close(found, wanted(sample, named), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("distance", "wanted"),
    [(L2(), 12.5), (L1(), 3.5), (PseudoHuber(0.001), 3.499), (AdaptiveL2(1.0, 0.0), 1.0)],
)
def test_distances(distance: Distance, wanted: float) -> None:
    error = torch.tensor([[3.0, -4.0], [3.0, 4.0]])
    assert distance.of(error).tolist() == pytest.approx([wanted, wanted], abs=1e-4)


def test_adaptive_weights_make_samples_pull_alike() -> None:
    error = torch.tensor([[1.0], [10.0]], requires_grad=True)
    AdaptiveL2(1.0, 0.0).of(error).sum().backward()
    assert error.grad is not None
    assert (error.grad * error.detach()).flatten().tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_level_rates_are_derivatives(schedule: NoiseSchedule) -> None:
    near = [smooth_levels(schedule, torch.tensor([t], dtype=torch.float64)) for t in (399.0, 401.0)]
    rates = level_rates(schedule, smooth_levels(schedule, torch.tensor([400.0])))
    width = float(flow_time(near[1]) - flow_time(near[0]))
    for name in ("timestep", "alpha", "sigma"):
        pair = [float(getattr(levels, name).flatten()[0]) for levels in near]
        found = float(getattr(rates, name).flatten()[0])
        assert math.isclose(found, (pair[1] - pair[0]) / width, rel_tol=1e-3)
