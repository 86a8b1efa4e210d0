"""A backbone whose teacher is exact: data N(mean, variance) and a linear network with adapters.

The network answers x0 = W f(x, t) + c with features f that hold the exact posterior mean, so the
frozen base is the perfect teacher and low-rank updates of W are a linear student and critic.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewstep.noise_schedule import Flow
from fewstep.recipe import Base, Schedule
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.components.grids import StudentPath, even_path
from fewstep.trainer.config import EvaluationConfig, GridConfig, LoraConfig, TrainConfig
from fewstep.trainer.context import Setting, StepContext
from fewstep.trainer.data.latent_book import LatentBook, LatentBucket
from fewstep.trainer.data.prompt_book import PromptBook
from fewstep.trainer.draws import Draws
from fewstep.trainer.learner import Learner
from fewstep.trainer.loop import advance
from fewstep.trainer.meters import ChannelStatistics
from fewstep.trainer.methods.method import Frame, Method
from fewstep.trainer.parameters.cast import Cast
from fewstep.trainer.parameters.policies import LoraPolicy
from fewstep.trainer.roles import Role
from fewstep.trainer.routes import SingleRoute
from fewstep.trainer.run import Run
from fewstep.trainer.run_folder import RunFolder
from fewstep.trainer.setup import build_frame, fill_cast
from fewstep.trainer.stages import Stage

MEAN, VARIANCE = 1.5, 0.25
SHAPE = (4, 1, 1)
CPU = torch.device("cpu")


class ExactDenoiser(nn.Module):
    """x0 of data N(1.5, 0.25) in each of D dimensions, as a frozen linear layer of features."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[0, 0] = 1.0
            self.head.bias.zero_()

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.head(self.features(sample, timestep)).squeeze(-1)

    @staticmethod
    def features(sample: Tensor, timestep: Tensor) -> Tensor:
        """Shape (..., 6): the exact x0 first, then what a linear answer may need."""
        sigma = (timestep / 1000.0).reshape(-1, 1, 1, 1)
        alpha = 1.0 - sigma
        pull = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        exact = MEAN + pull * (sample - alpha * MEAN)
        one = torch.ones_like(sample)
        features = [exact, sample, sigma * sample, alpha * sample, one, sigma * one]
        return torch.stack(features, dim=-1)


class ExactBackbone(Backbone):
    """`Backbone` over `ExactDenoiser`; conditions are empty."""

    family, component = "toy", "transformer"
    lora_targets = ("head",)

    def __init__(self) -> None:
        super().__init__(None, Flow(), "x0", 0)  # pyright: ignore[reportArgumentType]
        self.exact = ExactDenoiser()

    @property
    def denoiser(self) -> nn.Module:
        return self.exact

    def encode(self, prompts: list[str]) -> Condition:
        return Condition(torch.zeros(len(prompts), 1, 1))

    def output(
        self, network: nn.Module, sample: Tensor, timestep: Tensor, condition: Condition
    ) -> Tensor:
        return network(sample, timestep)

    def base(self, model_id: str) -> Base:
        return Base(family="toy", prediction="x0", schedule=Schedule(kind="flow", shift=1.0))

    @property
    def feature_layers(self) -> tuple[str, ...]:
        return ("head",)

    def latent_shape(
        self, height_px: int = 0, width_px: int = 0, num_frames: int = 0
    ) -> tuple[int, ...]:
        return SHAPE


def exact_book(backbone: ExactBackbone, count: int = 1) -> PromptBook:
    """A book of empty prompts."""
    return PromptBook(("",) * count, backbone.encode([""] * count), backbone.encode([""]))


def exact_latents(count: int = 512, shape: tuple[int, ...] = SHAPE) -> LatentBook:
    """Real data, seeded."""
    generator = torch.Generator().manual_seed(7)
    x0 = MEAN + VARIANCE**0.5 * torch.randn((count, *shape), generator=generator)
    return LatentBook((LatentBucket((x0,), torch.zeros(count, dtype=torch.long)),))


def exact_setting(roles: Sequence[Role] = (Role.STUDENT, Role.CRITIC, Role.AVERAGE)) -> Setting:
    """Setting of the exact teacher with rank-1 roles, data and one prompt."""
    backbone = ExactBackbone()
    cast = Cast(backbone.denoiser, backbone.own_networks)
    generator = torch.Generator().manual_seed(0)
    for role in roles:
        cast.add(role, LoraPolicy(("head",), 1, 1.0), generator)
    return Setting(backbone, cast, exact_book(backbone), exact_latents(), (SHAPE,), SingleRoute())


def exact_context(
    setting: Setting,
    *,
    count: int = 64,
    step: int = 0,
    progress: float = 0.0,
    with_grad: bool = True,
    uses_data: bool = False,
) -> StepContext:
    """One update's context."""
    draws = Draws(seed=0, step=step, update=0, samples=range(count), device=CPU)
    return StepContext(
        setting,
        draws,
        progress=progress,
        expert=None,
        with_grad=with_grad,
        uses_data=uses_data,
    )


def exact_path(num_steps: int, stochasticity: float = 0.0) -> StudentPath:
    """The even flow grid."""
    return even_path(Flow(), num_steps, stochasticity=stochasticity)


def exact_run(
    method: Method,
    *,
    num_steps: int = 1,
    batch_size: int = 256,
    backbone: ExactBackbone | None = None,
    book: PromptBook | None = None,
    rank: int = 1,
    **grid: object,
) -> Run:
    """A whole run of a method on the exact teacher, at step 0; drive it with `finish`."""
    backbone = ExactBackbone() if backbone is None else backbone
    shape = backbone.latent_shape()
    book = exact_book(backbone) if book is None else book
    config = TrainConfig(
        method=method,  # pyright: ignore[reportArgumentType]
        model="exact",
        guidance_scale=1.0,
        batch_size=batch_size,
        grad_clip=10.0,
        ema_decay=0.9,
        grid=GridConfig(num_steps=num_steps, **grid),  # pyright: ignore[reportArgumentType]
        lora=method.parameters(LoraConfig(rank=rank, alpha=float(rank), critic_rank=rank)),
        evaluation=EvaluationConfig(every=0),
    )
    frame: Frame = build_frame(config, backbone, book)
    stages: tuple[Stage, ...] = method.stages(frame)
    setting = Setting(
        backbone,
        Cast(backbone.denoiser, backbone.own_networks),
        book,
        exact_latents(shape=shape),
        (shape,),
        method.route(frame),
    )
    fill_cast(setting, frame, stages)
    return Run(
        config=config,
        folder=RunFolder(config.out),
        setting=setting,
        frame=frame,
        stages=stages,
        evaluator=None,
        teacher_statistics=ChannelStatistics.of(torch.randn(8, *shape)),
    )


def finish(run: Run, each: Callable[[Run], None] = lambda run: None) -> Run:
    """Run all steps, without files."""
    while not run.is_done:
        advance(run)
        each(run)
    return run


def moments(run: Run, count: int = 400) -> tuple[float, float]:
    """Mean and variance of what the averaged student draws on the run's grid."""
    latents = run.sample([0] * count, 123)
    return latents.mean().item(), latents.var().item()


def learner(parameters: Sequence[nn.Parameter], rate: float, beta1: float = 0.0) -> Learner:
    """An optimizer for hand-made loops."""
    return Learner(
        parameters, learning_rate=rate, betas=(beta1, 0.99), grad_clip=10.0, scale_loss=False
    )
