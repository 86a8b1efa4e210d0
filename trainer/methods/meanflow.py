"""MeanFlow distillation: a student that is told where its step ends learns average velocities."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from fewstep.errors import ConfigError
from fewstep.trainer.components.average_velocity import (
    AverageVelocity,
    Derivative,
    FiniteDifference,
    ForwardMode,
)
from fewstep.trainer.components.distances import AdaptiveL2
from fewstep.trainer.components.jump_times import BelowStart, ClockTimes
from fewstep.trainer.components.taus import LogitNormal
from fewstep.trainer.components.terms import Weighted
from fewstep.trainer.config_checks import above, within
from fewstep.trainer.config_parts import LoraConfig
from fewstep.trainer.methods.jumps import JumpConfig
from fewstep.trainer.methods.method import Frame, Method, MethodFacts
from fewstep.trainer.stages import Stage

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Meanflow(Method):
    """Geng et al. 2025, as distillation of a guided teacher."""

    facts: ClassVar[MethodFacts] = MethodFacts(
        name="meanflow",
        summary="average velocities of the guided teacher, by a student that knows both times",
        paper="MeanFlow, arXiv:2505.13447",
        needs="prompts and pictures",
        num_steps=4,
        artefact="LoRA with a two-time head",
        equation="|u(x_t, t, s) - stopgrad(v_w - (t - s) du/dt)|^2, adaptively weighted",
        deviations="v is the guided teacher's velocity, not that of data; du/dt by finite "
        "differences unless derivative is jvp",
    )
    jump: JumpConfig = field(default_factory=JumpConfig)
    derivative: Literal["difference", "jvp"] = "difference"
    """du/dt: a finite difference (one more student call), or a Jacobian-vector product."""
    delta: float = 0.005
    """derivative difference: share of the clock between the two calls."""
    different: float = 0.75
    """Share of samples whose step has a length; the others follow the teacher's velocity."""
    reach: float = 1.0
    """Longest step, share of the clock (restricted MeanFlow: below 1)."""
    time_mean: float = -0.4
    """Of the logit-normal law of both times; the paper's is -0.4."""
    time_std: float = 1.0
    """Its deviation."""
    power: float = 1.0
    """p of the adaptive weight 1 / (error^2 + c)^p; 0 is the plain square."""

    def __post_init__(self) -> None:
        within("delta", self.delta, 1e-4, 0.1)
        within("different", self.different, 0.0, 1.0)
        within("reach", self.reach, 0.01, 1.0)
        above("time-std", self.time_std, 0.0)
        within("power", self.power, 0.0, 2.0)

    def stages(self, frame: Frame) -> tuple[Stage, ...]:
        if frame.backbone.prediction != "flow":
            raise ConfigError(
                "recipes know two-time students of flow teachers only, but "
                f"{frame.config.model} predicts {frame.backbone.prediction}; choose another method"
            )
        exact = self.derivative == "jvp"
        derivative: Derivative = ForwardMode() if exact else FiniteDifference(self.delta)
        times = ClockTimes(
            BelowStart(self.delta),
            LogitNormal(self.time_mean, self.time_std),
            reach=self.reach,
            equal=1.0 - self.different,
        )
        term = AverageVelocity(
            self.jump.start(frame),
            times,
            self.jump.scale(frame),
            derivative,
            AdaptiveL2(self.power),
        )
        stage = Stage(
            name="average velocity",
            num_steps=self.jump.num_steps,
            terms=(Weighted(term),),
            learning_rate=self.jump.learning_rate,
            uses_data=self.jump.uses_data,
        )
        return (stage,)

    def parameters(self, lora: LoraConfig) -> LoraConfig:
        return dataclasses.replace(lora, student="two-time")

    def check(self, config: "TrainConfig") -> None:
        if config.lora.student != "two-time":
            raise ConfigError(
                f"meanflow's student is told where its step ends, but lora.student is "
                f"{config.lora.student!r}; set it to two-time"
            )
        if config.grid.stochasticity > 0.0:
            raise ConfigError(
                "meanflow's steps are deterministic, but grid.stochasticity is "
                f"{config.grid.stochasticity:g}; set it to 0"
            )
