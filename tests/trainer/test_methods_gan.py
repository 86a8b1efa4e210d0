"""dmd2-gan, f-distill, embedding-loss and swd on the exact teacher; settings that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.trainer import checkpoint
from fewstep.trainer.components.critics import Critic
from fewstep.trainer.components.discriminators import GanTerm
from fewstep.trainer.components.divergences import WEIGHTS, Divergence, RatioState
from fewstep.trainer.components.embedding_mmd import EmbeddingMmd, PatchMmd
from fewstep.trainer.components.feature_distillation import BlockKd, FeatureKd
from fewstep.trainer.components.rollouts import Either
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.config import LoraConfig, TrainConfig
from fewstep.trainer.config_parts import GridConfig
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.adversarial import GanConfig
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.dmd2_gan import Dmd2Gan
from fewstep.trainer.methods.embedding_loss import EmbeddingLoss
from fewstep.trainer.methods.f_distill import FDistill
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.smaller import with_imitation
from fewstep.trainer.methods.swd import PatchConfig, Swd
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.run_folder import RunFolder
from fewstep.trainer.run_state import restore_run, save_run
from fewstep.trainer.setup import build_frame
from fewstep.trainer.stages import Stage
from tests.trainer.analytic import MEAN, VARIANCE, exact_book, exact_run, finish, moments
from tests.trainer.watched import WatchedBackbone, place_student

MATCH = MatchConfig(
    num_steps=60,
    learning_rate=0.03,
    critic_learning_rate=0.05,
    critic_updates=2,
    critic_warmup=30,
)
GAN = GanConfig(weight=0.02, discriminator_weight=0.1, features="teacher", width=16)


def watched_run(method: Method, num_steps: int = 1, batch_size: int = 128) -> Run:
    return exact_run(method, num_steps=num_steps, batch_size=batch_size, backbone=WatchedBackbone())


def off_the_data(run: Run) -> Run:
    """The student (and its average) at mean + 0.3 and deviation 0.3 of the data's 0.5."""
    place_student(run.setting, 0.3, (0.0, 1.0, 0.0, 0.0, 1.0, 0.0))
    run.setting.cast.copy(Role.AVERAGE, Role.STUDENT)
    return run


def reaches_the_data(run: Run, mean_error: float = 0.12, variance_error: float = 0.35) -> None:
    finish(run)
    mean, variance = moments(run)
    assert abs(mean - MEAN) < mean_error
    assert abs(variance / VARIANCE - 1.0) < variance_error


# --- on the exact teacher


def test_dmd2_gan_reaches_mean_and_variance() -> None:
    run = watched_run(Dmd2Gan(match=replace(MATCH, num_steps=100), gan=GAN), batch_size=64)
    assert moments(run)[1] < 0.01  # the one-step student starts at the posterior mean
    reaches_the_data(run)


def test_dmd2_gan_whose_discriminator_reads_the_critic() -> None:
    """Two steps of re-noising; the layer is before the adapter, so features stay as they are."""
    gan = replace(GAN, features="critic", r1=1.0, delay=0.2, ramp=0.2)
    run = watched_run(Dmd2Gan(match=replace(MATCH, learning_rate=0.01), gan=gan), num_steps=2)
    before = moments(run)
    finish(run)
    after = moments(run)
    assert abs(after[1] / VARIANCE - 1.0) < abs(before[1] / VARIANCE - 1.0)
    assert abs(after[0] - MEAN) < 0.15


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_every_divergence_has_the_data_as_its_minimum(divergence: Divergence) -> None:
    method = FDistill(divergence=divergence, match=MATCH, gan=GAN)
    run = off_the_data(watched_run(method))
    assert moments(run) == pytest.approx((MEAN + 0.3, 0.09), abs=0.03)
    assert run.stages[0].name == f"{divergence} matching"
    reaches_the_data(run, mean_error=0.12, variance_error=0.4)
    state = run.setting.cast.modules["ratio"]
    assert isinstance(state, RatioState)
    assert float(state.ratios.count.sum()) > 0.0


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_embedding_loss_keeps_the_fixed_point_of_matching(kernel: str) -> None:
    method = EmbeddingLoss(
        match=MATCH,
        weight=0.02,
        kernel=kernel,  # pyright: ignore[reportArgumentType]
        num_networks=4,
        network_width=8,
    )
    reaches_the_data(off_the_data(exact_run(method, batch_size=128)))


def test_swd_reaches_the_data_at_the_last_size() -> None:
    """Values are independent, so pictures have no sizes to speak of; the loop runs through all."""
    method = Swd(
        match=replace(MATCH, num_steps=100, exit="last"),
        gan=replace(GAN, weight=0.005),
        patches=PatchConfig(weight=0.005),
        data_share=0.0,
    )
    run = exact_run(
        method,
        num_steps=2,
        batch_size=64,
        backbone=WatchedBackbone((1, 4, 4)),
        stochasticity=1.0,
        sizes=(0.5, 1.0),
    )
    reaches_the_data(run, mean_error=0.2, variance_error=0.5)


# --- identities


def student_gradient(method: Method) -> Tensor:
    run = exact_run(method, backbone=WatchedBackbone(), batch_size=64)
    with torch.no_grad():
        for role in (Role.STUDENT, Role.CRITIC):
            for parameter in run.setting.cast.parameters(role):
                parameter.add_(0.1)
    context = run.contexts(0, with_grad=True)[0]
    parts = [part for part in run.stage.terms if part.weight > 0.0]
    loss = torch.stack([part.weight * part.term.loss(context)[0] for part in parts]).sum()
    found = torch.autograd.grad(loss, run.setting.cast.parameters(Role.STUDENT))
    return torch.cat([g.flatten() for g in found])


def test_a_fresh_discriminator_changes_nothing() -> None:
    """Its logit is 0 everywhere: no push, ratio 1, weight 1, whatever the divergence."""
    matching = Dmd2Gan(match=MATCH, gan=replace(GAN, weight=0.0))
    plain = student_gradient(matching)
    assert plain.norm() > 1e-3
    torch.testing.assert_close(student_gradient(replace(matching, gan=GAN)), plain)
    for divergence in ("js", "kl", "jeffreys"):
        method = FDistill(divergence=divergence, match=MATCH, gan=GAN)
        torch.testing.assert_close(student_gradient(method), plain)


def test_the_stages_hold_what_the_papers_name() -> None:
    backbone = WatchedBackbone((1, 4, 4))
    book = exact_book(backbone)

    def stage_of(method: Method, **grid: object) -> Stage:
        config = TrainConfig(
            method=method,  # pyright: ignore[reportArgumentType]
            model="exact",
            grid=GridConfig(**grid),  # pyright: ignore[reportArgumentType]
        )
        return method.stages(build_frame(config, backbone, book))[0]

    def kinds(method: Method, **grid: object) -> list[type]:
        stage = stage_of(method, **grid)
        assert stage.uses_data
        assert isinstance(stage.critic, Critic)
        return [type(part.term) for part in stage.terms]

    assert kinds(Dmd2Gan()) == [ScoreDifference, GanTerm]
    assert kinds(FDistill(), num_steps=1) == [ScoreDifference, GanTerm]
    assert kinds(EmbeddingLoss(), num_steps=1) == [ScoreDifference, EmbeddingMmd]
    ladder = {"num_steps": 2, "stochasticity": 1.0, "sizes": (0.5, 1.0)}
    assert kinds(Swd(), **ladder) == [ScoreDifference, GanTerm, PatchMmd]
    less = Swd(gan=GanConfig(weight=0.0), patches=PatchConfig(weight=0.0), data_share=0.0)
    assert kinds(less, **ladder) == [ScoreDifference]
    assert less.modules(None) == {}  # pyright: ignore[reportArgumentType]
    critic = stage_of(Swd(), **ladder).critic
    assert critic is not None
    assert isinstance(critic.rollout, Either)
    assert critic.rollout.needs_data
    assert critic.null_share == 0.0
    guided = stage_of(Swd(critic_guidance=2.0), **ladder).critic
    assert guided is not None
    assert guided.null_share > 0.0  # a guided critic has to know the null prompt


# --- state


def test_the_running_ratio_resumes_exactly(tmp_path: Path) -> None:
    """Three steps, a checkpoint, two more; and the last two again in a new run."""
    method = FDistill(divergence="kl", match=replace(MATCH, num_steps=5), gan=GAN)

    def fresh() -> Run:
        run = watched_run(method, batch_size=32)
        run.folder = RunFolder(tmp_path / "run")
        return run

    run = fresh()
    for _ in range(3):
        advance(run)
    save_run(run)
    for _ in range(2):
        advance(run)
    again = fresh()
    found = checkpoint.latest(again.folder.checkpoints)
    assert found is not None
    restore_run(again, found)
    assert again.step == 3
    for _ in range(2):
        advance(again)
    for name in ("ratio", "discriminator"):
        first, second = (r.setting.cast.modules[name].state_dict() for r in (run, again))
        assert list(first) == list(second)
        for key in first:
            assert torch.equal(first[key], second[key]), f"{name} {key}"
    for role in (Role.STUDENT, Role.CRITIC):
        pairs = zip(*(r.setting.cast.parameters(role) for r in (run, again)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert float(run.setting.cast.modules["ratio"].ratios.count.sum()) > 0.0  # pyright: ignore


# --- settings


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (FDistill(gan=GanConfig(weight=0.0)), "an f-divergence needs a discriminator"),
        (FDistill(gan=GanConfig(loss="hinge")), "logit of a hinge discriminator is no log density"),
    ],
)
def test_ratios_need_a_softplus_discriminator(method: Method, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(method=method)  # pyright: ignore[reportArgumentType]


def test_embeddings_need_pairs() -> None:
    with pytest.raises(ConfigError, match="compares pairs of samples"):
        TrainConfig(method=EmbeddingLoss(), batch_size=4, accumulation=4)


def test_methods_survive_json() -> None:
    for method in (
        Dmd2Gan(gan=GanConfig(layers=("mid_block",), loss="hinge")),
        FDistill(divergence="neyman"),
        EmbeddingLoss(kernel="rbf"),
        Swd(patches=PatchConfig(distance="rbf")),
    ):
        config = TrainConfig(method=method)
        assert TrainConfig.from_dict(config.to_dict()) == config


def test_a_smaller_student_starts_by_imitation(tmp_path: Path) -> None:
    """With budget shares 0.3 to 0.7, and only where the student is smaller."""
    from fewstep.trainer.backbones.sd3 import Sd3Backbone
    from fewstep.trainer.backbones.settings import EdgeSettings
    from fewstep.trainer.data.prompt_book import PromptBook
    from tests.tiny_pipelines import build_sd3
    from tests.trainer.backbone_cases import SD3

    backbone = Sd3Backbone(build_sd3(layers=3), EdgeSettings())
    book = PromptBook(("", ""), SD3.condition(), SD3.null_condition())
    config = TrainConfig(
        method=Dmd2(), model="tiny", lora=LoraConfig(student="smaller", keep_blocks=2)
    )
    frame = build_frame(config, backbone, book)
    stages = with_imitation(frame, config.method.stages(frame))
    assert [stage.name for stage in stages] == ["imitation", "distribution matching"]
    assert stages[0].share / (stages[0].share + stages[1].share) == pytest.approx(0.3)
    assert [type(part.term) for part in stages[0].terms] == [FeatureKd, BlockKd]
    for lora in (LoraConfig(), LoraConfig(student="smaller", imitation_steps=0)):
        frame = build_frame(replace(config, lora=lora), backbone, book)
        assert len(with_imitation(frame, config.method.stages(frame))) == 1
