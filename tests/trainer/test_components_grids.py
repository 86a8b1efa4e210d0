"""Grids and exits: what a random grid may be, and that all parts of an update see the same one."""

from collections import Counter

import pytest
import torch

from fewstep.errors import ConfigError
from fewstep.noise_schedule import Flow, NoiseSchedule, Vp
from fewstep.trainer.components.grids import (
    ANY_EXIT,
    LAST_EXIT,
    NOT_FIRST_EXIT,
    Exit,
    FixedGrid,
    GridChoice,
    RandomGrid,
    even_path,
    listed_path,
)
from fewstep.trainer.draws import Draws

SCHEDULES = [Flow(), Vp()]


def draws(step: int = 0, samples: range = range(8)) -> Draws:
    return Draws(seed=3, step=step, update=0, samples=samples, device=torch.device("cpu"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_grids_fall_from_full_noise_to_clean_data(schedule: NoiseSchedule) -> None:
    law = RandomGrid(schedule, least=1, most=28)
    full = schedule.uniform_timesteps(1)[0]
    counts = Counter[int]()
    for step in range(200):
        path = law.draw(draws(step), "rollout")
        clock = [level.timestep for level in path.levels]
        assert clock == sorted(set(clock), reverse=True)
        assert clock[0] == full
        assert clock[-1] == 0.0
        assert all(0.25 * full - 0.5 <= t <= 0.95 * full + 0.5 for t in clock[1:-1])
        counts[path.num_steps] += 1
    assert min(counts) == 1
    assert max(counts) == 28 if isinstance(schedule, Flow) else max(counts) > 24


def test_random_grids_of_a_vp_table_are_integers() -> None:
    for step in range(50):
        path = RandomGrid(Vp(), least=20, most=28).draw(draws(step), "rollout")
        assert all(level.timestep == round(level.timestep) for level in path.levels)


def test_a_crowded_vp_grid_has_no_step_of_no_length() -> None:
    """50 positions between timesteps 499.5 and 509.5 are 11 steps at most."""
    path = RandomGrid(Vp(), least=50, most=50, low=0.5, high=0.51).draw(draws(), "rollout")
    clock = [level.timestep for level in path.levels]
    assert len(set(clock)) == len(clock) <= 13


def test_inner_positions_are_uniform() -> None:
    law = RandomGrid(Flow(), least=8, most=8)
    inner = [s.sigma for k in range(500) for s in law.draw(draws(k), "rollout").levels[1:-1]]
    values = torch.tensor(inner, dtype=torch.float64)
    assert values.mean().item() == pytest.approx(0.6, abs=0.01)
    assert values.var().item() == pytest.approx(0.7**2 / 12, rel=0.05)


def test_a_choice_takes_every_grid_equally_often_and_a_fixed_grid_is_fixed() -> None:
    paths = tuple(even_path(Flow(), count) for count in (1, 2, 4))
    choice = GridChoice(paths)
    counts = Counter(choice.draw(draws(k), "rollout").num_steps for k in range(600))
    assert all(150 < counts[count] < 250 for count in (1, 2, 4))
    assert FixedGrid(paths[1]).draw(draws(), "rollout") is paths[1]


@pytest.mark.parametrize("exit_at", [ANY_EXIT, LAST_EXIT, NOT_FIRST_EXIT, Exit(1, 2)])
def test_exits_stay_in_bounds_and_reach_both_ends(exit_at: Exit) -> None:
    found = {exit_at.draw(draws(k), "rollout", 4) for k in range(100)}
    low = exit_at.first % 4
    high = exit_at.last % 4
    assert found == set(range(low, high + 1))


@pytest.mark.parametrize(
    ("exit_at", "num_steps"),
    [(NOT_FIRST_EXIT, 1), (Exit(4, 4), 4), (Exit(2, 1), 4), (Exit(-5, -1), 4)],
)
def test_an_exit_that_a_grid_does_not_have_is_refused(exit_at: Exit, num_steps: int) -> None:
    with pytest.raises(ConfigError, match=f"on a grid of {num_steps} steps; use a longer grid"):
        exit_at.draw(draws(), "rollout", num_steps)


def test_all_parts_of_an_update_share_grid_and_exit() -> None:
    law = RandomGrid(Flow())
    for step in range(30):
        whole = draws(step)
        parts = [whole, *whole.split(4), draws(step, range(40, 44))]
        paths = {law.draw(part, "rollout") for part in parts}
        assert len(paths) == 1
        num_steps = paths.pop().num_steps
        assert len({ANY_EXIT.draw(part, "rollout", num_steps) for part in parts}) == 1


def test_names_draw_their_own_exits() -> None:
    found = {(ANY_EXIT.draw(draws(k), "a", 4), ANY_EXIT.draw(draws(k), "b", 4)) for k in range(300)}
    assert len(found) == 16


def test_even_grids_are_shifted_once_and_listed_grids_not_at_all() -> None:
    shifted = even_path(Flow(), 4, shift=5.0)
    assert [s.timestep for s in shifted.levels] == pytest.approx([1000, 937.5, 2500 / 3, 625, 0])
    vp = even_path(Vp(), 4, shift=5.0)
    assert [s.timestep for s in vp.levels] == [999, 749, 499, 249, 0]
    listed = listed_path(Flow(), (1000.0, 500.0))
    assert [s.sigma for s in listed.levels] == [1.0, 0.5, 0.0]
