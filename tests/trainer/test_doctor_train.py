"""What `fewstep doctor train` says is right where the truth is known."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewstep.noise_schedule import Flow
from fewstep.trainer.components.grids import even_path
from fewstep.trainer.doctor.__main__ import main
from fewstep.trainer.doctor.cost import estimate, saved_bytes, trained_bytes
from fewstep.trainer.doctor.gradients import GradientRow, gradient_flow
from fewstep.trainer.doctor.probes import (
    GuidanceRow,
    bends,
    guidance_probe,
    proposed_gate,
    proposed_timesteps,
    teacher_latents,
)
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from tests.trainer.analytic import exact_run

MATCH = MatchConfig(num_steps=2, critic_warmup=0, critic_updates=1)


def test_saved_bytes_are_what_autograd_keeps() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    x = torch.ones(1000)

    def square() -> None:
        ((x * weight).square().sum()).backward()

    # x for the product's gradient, x * weight for the square's; parameters are not counted
    assert saved_bytes(square) == 2 * 4000
    assert saved_bytes(lambda: (x * 2.0).sum()) == 0


def test_trained_bytes_count_gradients_and_moments_but_not_the_averages() -> None:
    run = exact_run(Dmd2(match=MATCH))
    size = sum(p.numel() for p in run.setting.cast.parameters(run.student_roles()[0]))
    assert trained_bytes(run.setting.cast) == 4 * size * (4 + 4 + 1)  # student, critic, average


def test_only_intended_roles_learn_and_a_mistake_is_seen() -> None:
    run = exact_run(WarmDmd2(match=MATCH), num_steps=2, batch_size=8)
    rows = [row for k in range(2) for row in gradient_flow(run, k)]
    assert all(row.is_right for row in rows)
    assert {(row.learner, row.role) for row in rows if row.expected} == {
        ("student", "student"),
        ("critic", "critic"),
    }
    assert not GradientRow("student", "critic", moved=0.5, expected=False).is_right
    assert not GradientRow("critic", "critic", moved=0.0, expected=True).is_right


def test_the_cost_of_a_step_is_a_line_in_the_batch() -> None:
    run = exact_run(Dmd2(match=MATCH), batch_size=32)
    run.backbone.pipe = SimpleNamespace(components={"transformer": run.backbone.denoiser})
    cost = estimate(run, verify=True)
    assert [stage.name for stage in cost.stages] == ["distribution matching"]
    assert cost.memory_error is not None
    assert abs(cost.memory_error) < 0.05
    assert cost.stages[0].time_error is not None
    assert cost.total_hours > 0.0
    assert run.config.batch_size == 32


def test_unguided_teachers_do_no_harm_and_guided_ones_are_compared_with_their_own_pictures() -> (
    None
):
    run = exact_run(Dmd2(match=MATCH))
    truth = teacher_latents(run.setting, run.frame, 8)
    rows = guidance_probe(run.setting, run.frame, truth)
    assert [row.position for row in rows] == [i / 10 for i in range(1, 10)]
    assert all(row.harm == pytest.approx(1.0) for row in rows)  # w = 1, and no prompt to follow
    assert rows[0].cond_error < rows[-1].cond_error  # clean samples are easy


def test_the_gate_is_below_the_first_harm() -> None:
    def rows(*harm: float) -> list[GuidanceRow]:
        return [GuidanceRow((i + 1) / 10, 1.0, value) for i, value in enumerate(harm)]

    assert proposed_gate(rows(1.0, 1.0, 1.0)) is None
    assert proposed_gate(rows(1.0, 1.01, 1.2, 1.4)) == 0.2
    assert proposed_gate(rows(1.3, 1.0)) == 0.0


def test_steps_that_bend_alike() -> None:
    levels = list(even_path(Flow(), 8).levels[:-1])
    even = proposed_timesteps(levels, [0.0, *[1.0] * 7], 4)
    assert len(even) == 4
    assert list(even) == sorted(even, reverse=True)
    early = proposed_timesteps(levels, [0.0, 5.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.1], 4)
    assert sum(early) > sum(even)  # the path bends early: the steps go there
    straight = proposed_timesteps(levels, [0.0] * 8, 4)
    assert straight == (1000.0, 750.0, 500.0, 250.0)


def test_a_gaussians_path_bends_and_starts_at_full_noise() -> None:
    run = exact_run(Dmd2(match=MATCH))
    levels, bend = bends(run.setting, run.frame)
    assert levels[0].timestep == 1000.0
    assert bend[0] == 0.0
    assert sum(bend) > 0.1


@pytest.mark.slow
def test_the_command_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["digits-4step", "--out", str(tmp_path / "run"), "--batch-size", "8"]
    assert main(command) == 0
    assert "who learns from what" in capsys.readouterr().out
    report = json.loads((tmp_path / "run/doctor/doctor.json").read_text(encoding="utf-8"))
    assert len(report["timesteps"]) == 4
    assert (tmp_path / "run/doctor/teacher.png").stat().st_size > 1000


def test_a_missing_config_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.json"]) == 2
    assert "cannot be read as JSON" in " ".join(capsys.readouterr().err.split())
