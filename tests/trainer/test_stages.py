"""The stages on an exact teacher: a linear student reaches the data's mean and variance."""

import torch

from fewstep.noise_schedule import Flow
from fewstep.trainer.generate import even_levels, generate
from fewstep.trainer.learner import Learner
from fewstep.trainer.roles import Role
from fewstep.trainer.rollout import StudentPath, TauLaw, draw, roll_out
from fewstep.trainer.stages import DmdStage, Setting, TrajectoryStage, substeps
from tests.trainer.analytic import MEAN, VARIANCE, exact_setup

SHAPE = (4, 1, 1)


def learner(parameters: list, rate: float, beta1: float = 0.0) -> Learner:  # noqa: ANN001
    return Learner(
        parameters, learning_rate=rate, betas=(beta1, 0.99), grad_clip=10.0, scale_loss=False
    )


def test_a_linear_student_reaches_mean_and_variance_by_distribution_matching() -> None:
    """From the posterior mean (variance 0) to N(1.5, 0.25), seeing only scores."""
    backbone, bank, book = exact_setup()
    path = StudentPath(even_levels(backbone, 1), Flow(), 0.0)
    stage = DmdStage(Setting(backbone, book, path, 1.0), normaliser_floor=0.05)
    student = learner(bank.parameters(Role.STUDENT), 0.01)
    critic = learner(bank.parameters(Role.CRITIC), 0.02)
    generator = torch.Generator().manual_seed(0)

    def draws():  # noqa: ANN202
        return draw(
            book,
            path,
            SHAPE,
            256,
            tau=TauLaw(0.02, 0.98),
            generator=generator,
            device=torch.device("cpu"),
        )

    def student_variance() -> tuple[float, float]:
        x0 = roll_out(backbone, path, draws(), book.conditions.expand(256), with_grad=False).x0
        return x0.mean().item(), x0.var().item()

    assert student_variance()[1] < 0.01
    for step in range(400):
        fade = 1.0 - step / 400
        for _ in range(4):
            critic.update([lambda: stage.critic_loss(draws())], 1.0)
        student.update([lambda: stage.student_loss(draws())], fade)
    mean, variance = student_variance()
    assert abs(mean - MEAN) < 0.08
    assert abs(variance / VARIANCE - 1.0) < 0.25


def test_a_linear_student_follows_the_teachers_trajectory() -> None:
    """Two student steps land where eight teacher steps do."""
    backbone, bank, book = exact_setup()
    path = StudentPath(even_levels(backbone, 2), Flow(), 0.0)
    stage = TrajectoryStage(Setting(backbone, book, path, 1.0), teacher_substeps=16)
    student = learner(bank.parameters(Role.STUDENT), 0.02, beta1=0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        batch = draw(
            book,
            path,
            SHAPE,
            128,
            tau=TauLaw(0.0, 1.0),
            generator=generator,
            device=torch.device("cpu"),
        )
        student.update([lambda: stage.student_loss(batch)], 1.0 - step / 300)  # noqa: B023

    def latents(role: Role, steps: int) -> torch.Tensor:
        grid = StudentPath(even_levels(backbone, steps), Flow(), 0.0)
        return generate(
            backbone,
            book,
            grid,
            role=role,
            guidance_scale=1.0,
            prompts=[0] * 200,
            seeds=range(200),
            shape=SHAPE,
        )

    truth = latents(Role.TEACHER, 32)
    untrained = (latents(Role.TEACHER, 2) - truth).square().mean()
    trained = (latents(Role.STUDENT, 2) - truth).square().mean()
    assert trained < 0.05 * untrained


def test_accumulated_parts_give_the_gradient_of_the_large_batch() -> None:
    found = []
    for parts in (1, 4):
        backbone, bank, book = exact_setup()
        for parameter in bank.parameters(Role.STUDENT):
            parameter.data.add_(0.1)
        path = StudentPath(even_levels(backbone, 4), Flow(), 0.5)
        stage = DmdStage(Setting(backbone, book, path, 1.0), normaliser_floor=0.05)
        batch = draw(
            book,
            path,
            SHAPE,
            16,
            tau=TauLaw(0.02, 0.98),
            generator=torch.Generator().manual_seed(5),
            device=torch.device("cpu"),
        )
        losses = [stage.student_loss(part)[0] / parts for part in batch.split(parts)]
        total = torch.stack(losses).sum()
        total.backward()
        found.append([p.grad for p in bank.parameters(Role.STUDENT)])
    for whole, accumulated in zip(*found, strict=True):
        torch.testing.assert_close(whole, accumulated, rtol=1e-5, atol=1e-7)


def test_only_the_intended_role_gets_gradients() -> None:
    backbone, bank, book = exact_setup()
    path = StudentPath(even_levels(backbone, 4), Flow(), 0.0)
    stage = DmdStage(Setting(backbone, book, path, 2.0), normaliser_floor=0.05)
    batch = draw(
        book,
        path,
        SHAPE,
        8,
        tau=TauLaw(0.02, 0.98),
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    for loss_of, trained, other in (
        (stage.student_loss, Role.STUDENT, Role.CRITIC),
        (stage.critic_loss, Role.CRITIC, Role.STUDENT),
    ):
        loss_of(batch)[0].backward()
        assert all(p.grad is not None for p in bank.parameters(trained))
        assert all(p.grad is None for p in bank.parameters(other))
        for parameter in bank.parameters(trained):
            parameter.grad = None
    frozen = backbone.network.get_parameter("head.base.weight")
    assert frozen.grad is None


def test_substeps_divide_a_step_evenly() -> None:
    backbone, _, _ = exact_setup()
    path = StudentPath(even_levels(backbone, 4), Flow(), 0.0)
    stops = substeps(path, path.levels[0], path.levels[1], 5)
    assert [round(level.timestep) for level in stops] == [1000, 950, 900, 850, 800, 750]
    assert stops[0] is path.levels[0]
    assert stops[-1] is path.levels[1]
