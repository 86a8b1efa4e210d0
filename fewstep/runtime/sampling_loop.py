"""The step loop of the runtime: the recipe's plan, numpy arithmetic, one network call per step."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fewstep.errors import GenerationStopped
from fewstep.noise import NoiseBatch
from fewstep.recipe import FewStepRecipe
from fewstep.runtime.hosts.conditions import joined
from fewstep.runtime.hosts.host import Condition, Host, Size, cast
from fewstep.runtime.session import Session
from fewstep.sampling import to_x0
from fewstep.trajectory import PlannedStep, advance

Told = Callable[[int, int, np.ndarray], None]
"""(step, number of steps, predicted clean latents)."""


@dataclass(frozen=True, slots=True)
class Guided:
    """Both sides of guidance.

    Attributes:
        condition: Of the prompts.
        unconditional: Of the negative prompts; None makes one pass.
        scale: `uncond + scale * (cond - uncond)`.
    """

    condition: Condition
    unconditional: Condition | None
    scale: float


@dataclass(frozen=True, slots=True)
class Loop:
    """One run of the loop.

    Attributes:
        host: The family.
        denoisers: A session per expert, or one.
        plan: Steps to take.
        guided: Conditions.
        size: Of the finished pictures.
        noise: The pictures' streams, after the first noise was drawn.
        told: Called after each step.
        stop: Set by somebody else to stop between network calls, or before the decoding.
    """

    host: Host
    denoisers: tuple[Session, ...]
    plan: tuple[PlannedStep, ...]
    guided: Guided
    size: Size
    noise: NoiseBatch
    told: Told
    stop: threading.Event | None

    def run(self, sample: np.ndarray) -> np.ndarray:
        """The sample at the end of the plan.

        Args:
            sample: At the first level, shape (B, C, h, w), float32.

        Raises:
            GenerationStopped: `stop` was set.
        """
        prediction = self.host.recipe.base.prediction
        previous: tuple[np.ndarray, np.ndarray] | None = None
        shape = sample.shape[1:]
        for index, planned in enumerate(self.plan):
            self._heed_stop(index)
            output = self._output(sample, planned)
            x0 = to_x0(prediction, output, sample, planned.reading)
            noise = self._draw(shape) if planned.needs_noise else None
            before = (sample, x0)
            sample, previous = advance(planned, sample, x0, noise, previous), before
            self.told(index, len(self.plan), x0)
        self._heed_stop(len(self.plan))
        return sample

    def _heed_stop(self, done: int) -> None:
        if self.stop is not None and self.stop.is_set():
            raise GenerationStopped(f"stopped after {done} of {len(self.plan)} steps")

    def _draw(self, shape: tuple[int, ...]) -> np.ndarray:
        drawn = self.noise.draw(shape)
        deviation = self.host.recipe.base.schedule.sigma_data
        return drawn if deviation is None else np.float32(deviation) * drawn

    def _output(self, sample: np.ndarray, planned: PlannedStep) -> np.ndarray:
        guided, timestep = self.guided, planned.reading.timestep
        expert = planned.expert if len(self.denoisers) > 1 else None
        session = self.denoisers[expert or 0]
        if guided.unconditional is None:
            return self._call(session, sample, timestep, guided.condition)
        both = joined([guided.unconditional, guided.condition])
        found = self._call(session, np.concatenate([sample, sample]), timestep, both)
        without, with_prompt = np.split(found, 2)
        return self.host.guide(without, with_prompt, guided.scale)

    def _call(
        self, session: Session, sample: np.ndarray, timestep: float, condition: Condition
    ) -> np.ndarray:
        feeds = self.host.feeds(sample, timestep, condition, self.size)
        typed = {name: cast(value, session, name) for name, value in feeds.items()}
        name = self.host.denoiser_output
        found = session.run(typed, [name])[name].astype(np.float32, copy=False)
        return self.host.answer(found, self.size)


def is_guided(recipe: FewStepRecipe) -> bool:
    """Whether a step is two passes."""
    return recipe.guidance.mode in ("cfg", "true_cfg") and recipe.guidance.scale != 1.0
