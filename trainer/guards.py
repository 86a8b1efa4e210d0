"""What watches a run: numbers that are none, latents that drift, a critic that lags behind.

Warnings are always logged, once each time a fault begins; what else is done is `GuardConfig`'s.
"""

import logging
import math
from typing import Any

from fewstep.errors import TrainingError
from fewstep.trainer.config_parts import GuardConfig

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
MOST_NAN = 10


class Guard:
    """The watch over one run.

    Args:
        config: What to do about which fault.

    Attributes:
        extra_critic_updates: Critic steps to add to the next step.
        slow: Factor of the student's learning rate for the rest of the stage.
        is_healthy: Whether the last look at the latents found no drift.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.extra_critic_updates = 0
        self.slow = 1.0
        self.is_healthy = True
        self._nan_in_a_row = 0
        self._lags = False

    def after_step(self, step: int, metrics: Metrics) -> None:
        """Look at one step's metrics.

        Raises:
            TrainingError: A gradient was not a number, and the run is to stop at that.
        """
        self._look_at_numbers(step, metrics)
        cosine = metrics.get("health/dm_cos", 1.0)
        lags = self.config.critic_lag > 0.0 and cosine < self.config.critic_lag
        if lags and not self._lags:
            logger.warning(
                "step %d: the critic lags (dm_cos %.2f is below %.2f); it gets %d more steps",
                step,
                cosine,
                self.config.critic_lag,
                self.config.extra_critic_updates,
            )
        self._lags = lags
        self.extra_critic_updates = self.config.extra_critic_updates if lags else 0

    def _look_at_numbers(self, step: int, metrics: Metrics) -> None:
        names = ("health/grad_norm", "health/critic_grad_norm")
        bad = [name for name in names if not math.isfinite(metrics.get(name, 0.0))]
        self._nan_in_a_row = self._nan_in_a_row + 1 if bad else 0
        if not bad:
            return
        who = "critic" if bad == ["health/critic_grad_norm"] else "student"
        if self.config.nan == "skip" and self._nan_in_a_row < MOST_NAN:
            logger.warning("step %d: the %s's gradient is not a number; skipped", step, who)
            return
        raise TrainingError(
            f"the {who}'s gradient is not a number at step {step}; nothing was changed by it and "
            "the last checkpoint is good: run again with a lower learning rate, a lower "
            "guidance-scale or precision bf16 or fp32"
        )

    def after_meters(self, step: int, metrics: Metrics) -> None:
        """Look at the latents' drift.

        Raises:
            TrainingError: They drifted, and the run is to stop at that.
        """
        limit = self.config.drift
        drift = max(metrics["health/mean_drift"], metrics["health/std_drift"])
        is_healthy = limit == 0.0 or drift <= limit
        if not is_healthy and self.is_healthy:
            logger.warning(
                "step %d: latents drift from the teacher's (%.2f is above %.2f): over-saturation "
                "or collapse; lower the student's learning rate or the guidance scale",
                step,
                drift,
                limit,
            )
            if self.config.on_drift == "slow":
                self.slow *= 0.5
        self.is_healthy = is_healthy
        if not is_healthy and self.config.on_drift == "stop":
            raise TrainingError(
                f"latents drifted from the teacher's at step {step} ({drift:.2f} is above "
                f"{limit:g}); the exported adapter is the last one from before: lower the "
                "learning rate, or raise guard.drift to go on"
            )

    def new_stage(self) -> None:
        """A stage begins at its full rate."""
        self.slow = 1.0
        self.extra_critic_updates = 0

    def state(self) -> dict[str, Any]:
        """JSON-able; `restore` goes on from it."""
        return {
            "extra_critic_updates": self.extra_critic_updates,
            "slow": self.slow,
            "is_healthy": self.is_healthy,
            "nan_in_a_row": self._nan_in_a_row,
            "lags": self._lags,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.extra_critic_updates = state["extra_critic_updates"]
        self.slow = state["slow"]
        self.is_healthy = state["is_healthy"]
        self._nan_in_a_row = state["nan_in_a_row"]
        self._lags = state["lags"]
