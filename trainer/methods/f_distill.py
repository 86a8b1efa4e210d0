"""f-distill: any f-divergence instead of reverse KL, by the density ratio of a discriminator."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fewstep.errors import ConfigError
from fewstep.trainer.components.divergences import Divergence, DivergenceWeight, RatioState
from fewstep.trainer.config_checks import above, at_least, within
from fewstep.trainer.methods.adversarial import GanConfig
from fewstep.trainer.methods.dmd2_gan import adversarial_stage
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig

RATIO = "ratio"


@dataclass(frozen=True, kw_only=True)
class FDistill(Method):
    """Xu et al. 2025: score differences weighted by what the divergence makes of p / q."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="f-distill",
        summary="dmd2-gan whose samples are weighted so that another divergence is minimised",
        paper="f-distill, arXiv:2502.15681",
        needs="prompts and pictures",
        num_steps=1,
        artefact="LoRA",
        equation="grad of dmd2 times h(r) / mean h, r = exp(D(x_tau)), h(r) = r^2 f''(r)",
        deviations="ratios and weights are normalised by running means of earlier updates, so that "
        "cutting a batch changes nothing; real pictures have the fake ones' prompts",
    )
    divergence: Divergence = "js"
    """f: rkl (plain distribution matching), kl, js, softened-rkl, neyman, hellinger, jeffreys."""
    match: MatchConfig = field(default_factory=MatchConfig)
    gan: GanConfig = field(default_factory=lambda: GanConfig(features="teacher"))
    ratio_min: float = 0.1
    """Ratios are clipped from below."""
    ratio_max: float = 20.0
    """And from above."""
    ratio_bins: int = 10
    """Intervals of noise whose mean ratio is set to 1."""
    ratio_keep: float = 0.95
    """Of the running means, per update."""

    def __post_init__(self) -> None:
        above("ratio-min", self.ratio_min, 0.0)
        above("ratio-max", self.ratio_max, self.ratio_min)
        at_least("ratio-bins", self.ratio_bins, 1)
        within("ratio-keep", self.ratio_keep, 0.0, 0.999)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        match, gan = self.match, self.gan
        judge = gan.judge(frame, match.rollout(frame), tau=match.tau, name="dm")  # r at the scores
        weight = DivergenceWeight(self.divergence, judge, self.ratio_min, self.ratio_max, RATIO)
        name = f"{self.divergence} matching"
        return (adversarial_stage(frame, match, gan, judge, name=name, weights=(weight,)),)

    def modules(self, frame: Frame) -> dict[str, nn.Module]:
        return {**self.gan.modules(frame), RATIO: RatioState(self.ratio_bins, self.ratio_keep)}

    def check(self, config: "TrainConfig") -> None:
        if self.gan.weight == 0.0:
            raise ConfigError(
                "an f-divergence needs a discriminator for its density ratio, but gan.weight is 0; "
                "raise it, or take dmd2"
            )
        if self.gan.loss != "softplus":
            raise ConfigError(
                f"the logit of a {self.gan.loss} discriminator is no log density ratio; set "
                "gan.loss to softplus"
            )
