"""Taps: what they catch, whose gradient passes through them, and gradient checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.errors import ConfigError
from fewstep.trainer.backbones.loading import BACKBONES, load_backbone
from fewstep.trainer.backbones.sd3 import Sd3Backbone
from fewstep.trainer.backbones.settings import EdgeSettings
from fewstep.trainer.backbones.stable_diffusion import SdBackbone
from fewstep.trainer.components.discriminators import (
    Discriminator,
    DiscriminatorLoss,
    GanTerm,
)
from fewstep.trainer.components.embedding_mmd import PatchMmd
from fewstep.trainer.components.feature_distillation import BlockKd, FeatureKd, block_pairs
from fewstep.trainer.components.features import (
    FeatureTap,
    NetworkFeatures,
    PictureFeatures,
    default_layers,
    last_tensor,
    shapes_of,
    tapped,
)
from fewstep.trainer.components.grids import FixedGrid, even_path
from fewstep.trainer.components.rollouts import OffPath, StudentRollout
from fewstep.trainer.components.signals import ScoreDifference
from fewstep.trainer.components.targets import ConstantGuidance, Guided
from fewstep.trainer.context import StepContext
from fewstep.trainer.levels import levels_at
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import FullPolicy, SmallerPolicy
from fewstep.trainer.roles import Role, acting_as, role_checkpoint
from fewstep.trainer.setup import model_source
from tests.tiny_pipelines import build_sd3, build_sd15
from tests.trainer.analytic import ExactBackbone, exact_context, exact_setting
from tests.trainer.backbone_cases import FAMILIES, SD3, SD15, WAN22, Case, random_sample
from tests.trainer.watched import Watched, staged

CPU = torch.device("cpu")


def backbone_of(case: Case) -> Any:
    pipe = case.build()
    return BACKBONES[type(pipe).__name__](pipe, EdgeSettings())


def ask(backbone: Any, sample: Tensor, case: Case, layers: tuple[str, ...]) -> Any:
    levels = levels_at(backbone.schedule, torch.full((len(sample),), 0.5))
    return tapped(backbone, Role.TEACHER, sample, levels, case.condition(), layers)


def test_a_blocks_features_are_those_of_its_own_call() -> None:
    """SD3's first block, its inputs made by hand from the layers before it."""
    backbone = backbone_of(SD3)
    sample, condition = random_sample(backbone), SD3.condition()
    with torch.no_grad():
        answer = ask(backbone, sample, SD3, ("transformer_blocks.0",))
        net, timestep = backbone.denoiser, torch.full((2,), 500.0)
        _, image = net.transformer_blocks[0](
            hidden_states=net.pos_embed(sample),
            encoder_hidden_states=net.context_embedder(condition.sequence),
            temb=net.time_text_embed(timestep, condition.pooled),
        )
    torch.testing.assert_close(answer.features[0], image, rtol=0, atol=0)
    levels = levels_at(backbone.schedule, torch.full((2,), 0.5))
    plain = backbone.x0(Role.TEACHER, sample, levels, condition)
    torch.testing.assert_close(answer.x0, plain, rtol=0, atol=0)


def test_a_unets_down_block_gives_the_sample_that_goes_on() -> None:
    backbone = backbone_of(SD15)
    sample = random_sample(backbone)
    caught: list[Tensor] = []
    handle = backbone.denoiser.mid_block.register_forward_pre_hook(
        lambda module, args: caught.append(args[0])
    )
    layers = ("down_blocks.0", "down_blocks.1", "mid_block")
    with torch.no_grad():
        answer = ask(backbone, sample, SD15, layers)
    handle.remove()
    assert [f.ndim for f in answer.features] == [4, 4, 4]
    torch.testing.assert_close(answer.features[1], caught[0], rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in FAMILIES if c is not WAN22], ids=lambda c: c.name)
def test_every_familys_layers_can_be_read_and_lead_back_to_the_sample(case: Case) -> None:
    backbone = backbone_of(case)
    sample = random_sample(backbone).requires_grad_()
    layers = default_layers(backbone)
    backbone.denoiser.requires_grad_(False)
    answer = ask(backbone, sample, case, layers)
    assert len(answer.features) == len(layers)
    for feature in answer.features:
        assert feature.ndim in (3, 4)
        assert len(feature) == len(sample)
        assert feature.dtype == torch.float32
    total = torch.stack([f.square().mean() for f in answer.features]).sum()
    (slope,) = torch.autograd.grad(total, sample)
    assert slope.abs().max() > 0.0


def test_a_network_that_serves_other_noise_is_named() -> None:
    backbone = backbone_of(WAN22)
    with pytest.raises(ConfigError, match="took no part in the network's call"):
        ask(backbone, random_sample(backbone), WAN22, default_layers(backbone))
    sample = random_sample(backbone)
    levels = levels_at(backbone.schedule, torch.tensor([0.95, 0.1]))
    with pytest.raises(ConfigError, match="saw 1 of 2 samples"):
        tapped(
            backbone,
            Role.TEACHER,
            sample,
            levels,
            WAN22.condition(),
            ("transformer.blocks.0",),
        )


def test_the_slope_through_a_tap_is_the_numerical_one() -> None:
    net = backbone_of(SD3).denoiser.double().requires_grad_(False)
    condition = SD3.condition()
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64)
    direction = torch.randn(sample.shape, generator=generator, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        with FeatureTap(net, ("transformer_blocks.0.attn",)) as tap:
            net(
                x,
                encoder_hidden_states=condition.sequence[:1].double(),
                pooled_projections=condition.pooled[:1].double(),  # pyright: ignore
                timestep=torch.tensor([300.0], dtype=torch.float64),
            )
        return tap.features[0].square().sum()

    sample.requires_grad_()
    (slope,) = torch.autograd.grad(value(sample), sample)
    with torch.no_grad():
        numerical = (value(sample + 1e-5 * direction) - value(sample - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((slope * direction).sum(), numerical, rtol=1e-6, atol=1e-9)


def test_hooks_are_gone_after_the_block_and_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with FeatureTap(net, ("0",)) as tap:
        net(torch.ones(1, 2))
        assert len(net[0]._forward_hooks) == 1
    assert not net[0]._forward_hooks
    kept = tap.features[0].clone()
    net(torch.full((1, 2), 5.0))
    assert torch.equal(tap.features[0], kept)
    with pytest.raises(RuntimeError), FeatureTap(net, ("0",)):
        net(torch.ones(1, 3))
    assert not net[0]._forward_hooks


def test_recomputation_adds_nothing_and_the_gradient_is_the_same() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(3, 4)

    def slope(run: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        mine = x.clone().requires_grad_()
        with FeatureTap(net, ("0",)) as tap:  # the tapped layer lies inside the checkpoint
            run(net, mine)
        feature = tap.features[0]
        (tap.features[0].square().sum()).backward()
        assert tap.features[0] is feature
        assert mine.grad is not None
        return feature.detach(), mine.grad

    plain = slope(lambda block, value: block(value))
    checked = slope(lambda block, value: checkpoint(block, value, use_reentrant=False))
    for a, b in zip(plain, checked, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_mistakes_in_paths_are_sentences() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Sequential has no module 'middle'"):
        FeatureTap(net, ("middle",))
    backbone = ExactBackbone()  # its only layer gives (B, C, h, w, 1)
    with pytest.raises(ConfigError, match="gives features of shape"):
        shapes_of(NetworkFeatures(("head",)), backbone, backbone.encode([""]))


def test_the_last_tensor_of_nested_outputs() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert last_tensor(a) is a
    assert last_tensor((None, b)) is b
    assert last_tensor((b, (a, b, None))) is b


def test_an_own_network_is_read_instead_of_the_base() -> None:
    backbone = backbone_of(SD3)
    cast = Cast(backbone.denoiser, backbone.own_networks)
    cast.add(Role.CRITIC, FullPolicy(), torch.Generator())
    for parameter in cast.parameters(Role.CRITIC):
        parameter.data.mul_(1.1)
    sample = random_sample(backbone)
    levels = levels_at(backbone.schedule, torch.full((2,), 0.5))
    layers = ("transformer_blocks.0",)
    with torch.no_grad():
        seen = {
            role: tapped(backbone, role, sample, levels, SD3.condition(), layers).features[0]
            for role in (Role.CRITIC, Role.TEACHER)
        }
    assert not torch.allclose(seen[Role.CRITIC], seen[Role.TEACHER], rtol=1e-2)


def test_decoded_pictures_are_a_source_too() -> None:
    backbone = backbone_of(SD3)
    latents = torch.randn(1, 4, 4, 4).requires_grad_()
    levels = levels_at(backbone.schedule, torch.zeros(1))
    source = PictureFeatures(lambda pictures: pictures)
    (feature,) = source.features(backbone, latents, levels, SD3.condition())
    torch.testing.assert_close(feature, backbone.decode_float(latents))
    assert feature.requires_grad


# --- everything stacked in one update, with gradient checkpointing on and off


def digits_stage() -> Watched:
    backbone = load_backbone(
        model_source("digits-sd3"), precision=torch.float32, device=CPU, max_sequence_length=1
    )
    conditions = backbone.encode(["a handwritten digit one", "a handwritten digit two"])
    source = NetworkFeatures(default_layers(backbone))
    shape = backbone.latent_shape()
    return staged(backbone, conditions, backbone.encode([""]), source, shape)


def unet_stage() -> Watched:
    backbone = SdBackbone(build_sd15(), EdgeSettings())
    source = NetworkFeatures((*default_layers(backbone), "down_blocks.1.resnets.0"))
    null = SD15.null_condition()
    return staged(backbone, SD15.condition(), null, source, (4, 8, 8))


def student_loss(stage: Watched) -> Tensor:
    """Score difference, off-path score difference, GAN on the critic, patches of the teacher."""
    context = stage.context(with_grad=True)
    backbone = context.backbone
    rollout = StudentRollout(FixedGrid(even_path(backbone.schedule, 2)))
    target = Guided(ConstantGuidance(2.0))
    layers = default_layers(backbone)
    judge = Discriminator(NetworkFeatures(watched_layers(stage)), rollout)
    terms = (
        ScoreDifference(rollout, target),
        ScoreDifference(OffPath(rollout), target, name="off"),
        GanTerm(judge),
        PatchMmd(NetworkFeatures(layers, Role.TEACHER), rollout),
    )
    return torch.stack([term.loss(context)[0] for term in terms]).sum()


def critic_loss(stage: Watched) -> Tensor:
    """Denoising and discriminator with R1."""
    from fewstep.trainer.components.critics import Critic

    context = stage.context(with_grad=False)
    rollout = StudentRollout(FixedGrid(even_path(context.backbone.schedule, 2)))
    judge = Discriminator(NetworkFeatures(watched_layers(stage)), rollout)
    critic = Critic(rollout, extras=(DiscriminatorLoss(judge, weight=1.0, r1=1.0),))
    return critic.loss(context, Role.CRITIC)[0]


def watched_layers(stage: Watched) -> tuple[str, ...]:
    layers = default_layers(stage.setting.backbone)
    if isinstance(stage.setting.backbone, SdBackbone):
        return (*layers, "down_blocks.1.resnets.0")  # inside a block that is checkpointed
    return layers


def run(
    stage: Watched, loss: Callable[[Watched], Tensor], function: Any = None
) -> dict[str, Tensor]:
    """All gradients of one loss; backward runs while the critic is the active role."""
    network: Any = stage.setting.backbone.denoiser
    if function is None:
        network.disable_gradient_checkpointing()
    else:
        network.enable_gradient_checkpointing(function)
    network.train()
    value = loss(stage)
    with acting_as(Role.CRITIC):
        value.backward()
    return stage.gradients()


def plain_checkpoint(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


@pytest.mark.parametrize("make", [digits_stage, unet_stage])
def test_checkpointing_changes_no_gradient_of_any_role(make: Callable[[], Watched]) -> None:
    stage = make()
    for loss, learners in (
        (student_loss, ("student", "critic", "heads")),
        (critic_loss, ("critic", "heads")),
    ):
        plain = run(stage, loss)
        checked = run(stage, loss, role_checkpoint)
        for name in learners:
            assert plain[name].norm() > 1e-4, name
            torch.testing.assert_close(
                checked[name], plain[name], rtol=1e-6, atol=1e-6 * float(plain[name].abs().max())
            )


@pytest.mark.parametrize("make", [digits_stage, unet_stage])
def test_plain_checkpointing_would_give_another_gradient(make: Callable[[], Watched]) -> None:
    stage = make()
    plain = run(stage, gan_of_student)["student"]
    assert torch.allclose(run(stage, gan_of_student, role_checkpoint)["student"], plain, rtol=1e-5)
    wrong = run(stage, gan_of_student, plain_checkpoint)["student"]
    assert (wrong - plain).norm() > 0.05 * plain.norm()


def gan_of_student(stage: Watched) -> Tensor:
    """The student's call and the critic's in one graph; no teacher, whose recomputation fails."""
    context = stage.context(with_grad=True)
    rollout = StudentRollout(FixedGrid(even_path(context.backbone.schedule, 2)))
    return GanTerm(Discriminator(NetworkFeatures(watched_layers(stage)), rollout)).loss(context)[0]


# --- feature distillation


def smaller_stage(keep: int, layers: int = 3) -> tuple[StepContext, SmallerPolicy]:
    backbone = Sd3Backbone(build_sd3(layers=layers), EdgeSettings())
    source = NetworkFeatures(("transformer_blocks.0",))
    stage = staged(backbone, SD3.condition(), SD3.null_condition(), source, (4, 8, 8))
    policy = SmallerPolicy("transformer_blocks", keep)
    stage.setting.cast.add(Role.STUDENT, policy, torch.Generator())
    return stage.context(with_grad=True), policy


def rollout_of(context: StepContext) -> StudentRollout:
    return StudentRollout(FixedGrid(even_path(context.backbone.schedule, 2)))


def test_a_student_that_keeps_every_block_has_nothing_to_learn() -> None:
    context, policy = smaller_stage(keep=3)
    pairs = block_pairs(policy, context.backbone.denoiser)
    assert [(p.student, p.first, p.last) for p in pairs] == [
        (f"transformer_blocks.{i}",) * 3 for i in range(3)
    ]
    for term in (FeatureKd(rollout_of(context), pairs), BlockKd(rollout_of(context), pairs)):
        assert term.loss(context)[0].item() < 1e-10


def test_a_kept_block_stands_for_the_dropped_ones_before_it() -> None:
    context, policy = smaller_stage(keep=2)
    pairs = block_pairs(policy, context.backbone.denoiser)
    assert [(p.first[-1], p.last[-1]) for p in pairs] == [("0", "0"), ("1", "2")]
    for kind in (FeatureKd, BlockKd):
        assert kind(rollout_of(context), pairs).loss(context)[0].item() > 1e-4


def test_blocks_learn_alone_and_features_together() -> None:
    """The second block's distance reaches the first block through the network only."""
    context, policy = smaller_stage(keep=2)
    pairs = block_pairs(policy, context.backbone.denoiser)[1:]
    first = context.backbone.network(Role.STUDENT).get_submodule("transformer_blocks.0")

    def reaches_first(term: FeatureKd | BlockKd) -> bool:
        loss = term.loss(context)[0]
        parameters = list(first.parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return any(g is not None and float(g.abs().max()) > 0.0 for g in found)

    assert not reaches_first(BlockKd(rollout_of(context), pairs))
    assert reaches_first(FeatureKd(rollout_of(context), pairs))


def test_a_smaller_student_imitates_its_teacher() -> None:
    context, policy = smaller_stage(keep=2)
    pairs = block_pairs(policy, context.backbone.denoiser)
    rollout = rollout_of(context)
    parameters = context.setting.cast.parameters(Role.STUDENT)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses: list[float] = []
    for step in range(30):
        fresh = Watched(context.setting, (4, 8, 8)).context(with_grad=True, step=step)
        loss = FeatureKd(rollout, pairs).loss(fresh)[0] + BlockKd(rollout, pairs).loss(fresh)[0]
        loss.backward(inputs=parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_block_distillation_counts_as_one_student_evaluation() -> None:
    context, policy = smaller_stage(keep=2)
    pairs = block_pairs(policy, context.backbone.denoiser)
    rollout = rollout_of(context)
    context.rolled(rollout)
    before = context.backbone.evaluations.copy()
    BlockKd(rollout, pairs).loss(context)
    assert context.backbone.evaluations - before == {"teacher": 3, "student": 3}


def test_the_exact_teacher_counts_what_a_tap_asks() -> None:
    setting = exact_setting()
    context = exact_context(setting, count=8)
    levels = levels_at(setting.backbone.schedule, torch.full((8,), 0.5))
    tapped(setting.backbone, Role.CRITIC, context.normal("x"), levels, context.condition, ("head",))
    assert setting.backbone.evaluations["critic"] == 8
