"""The training loop: linear, and the one place that decides who is updated at each step."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewstep.trainer import checkpoint as ckpt
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.meters import peak_memory
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run
from fewstep.trainer.setup import build_run
from fewstep.trainer.stages import DmdStage, Metrics, TrajectoryStage

logger = logging.getLogger(__name__)
Report = Callable[[int, Metrics], None]
GRID_COLUMNS = 10
GRID_IMAGES = 50
GRID_SEED = 900_000_000


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        adapter: The exported file, or None if the run was interrupted before one existed.
        steps: Optimizer steps done.
        scores: Scores of the exported adapter.
        was_interrupted: Whether Ctrl-C ended it; run again to continue.
    """

    adapter: Path | None
    steps: int
    scores: dict[str, float]
    was_interrupted: bool


def train(config: TrainConfig, report: Report = lambda step, metrics: None) -> TrainResult:
    """Run, or continue, a distillation.

    Args:
        config: Everything about the run; `config.out` is where it lives.
        report: Called after every optimizer step with the step's metrics.

    Raises:
        ConfigError: A setting does not fit the model.
        CheckpointError: `config.out` holds a run with other settings.
    """
    run = build_run(config)
    found = ckpt.latest(run.folder.checkpoints)
    if found is not None:
        run.restore(found)
        logger.info("continuing %s at step %d of %d", config.out, run.step, config.num_steps)
    with _stop_on_interrupt() as stop:
        while run.step < config.num_steps and not stop.is_set():
            started = time.perf_counter()
            metrics = advance(run)
            metrics["time/step_s"] = time.perf_counter() - started
            metrics |= peak_memory(run.backbone.device)
            _look_after(run, metrics)
            report(run.step, metrics)
    was_interrupted = run.step < config.num_steps
    if was_interrupted:
        run.save()
    elif run.evaluator is None or config.evaluation.every == 0:
        run.export({})
    adapter = config.out / "adapter" / f"{config.out.name}.safetensors"
    return TrainResult(
        adapter if adapter.exists() else None, run.step, run.best_scores, was_interrupted
    )


def advance(run: Run) -> Metrics:
    """One optimizer step of the student, with the critic steps that belong to it."""
    config = run.config
    if run.step == config.warm_start.num_steps:
        _enter_dmd(run)
    stage = run.stage()
    metrics: Metrics = {}
    if isinstance(stage, DmdStage):
        is_first = run.step == config.warm_start.num_steps
        updates = config.dmd.critic_warmup if is_first else config.dmd.critic_updates
        for _ in range(updates):
            metrics |= run.update_critic(stage)
    else:
        assert isinstance(stage, TrajectoryStage)
    metrics |= run.update_student(stage)
    if isinstance(stage, DmdStage) and config.dmd.ida < 1.0:
        run.bank.blend(Role.CRITIC, Role.STUDENT, config.dmd.ida)
    run.step += 1
    return metrics


def _enter_dmd(run: Run) -> None:
    """The second stage starts from the first one's average, with fresh optimizers."""
    if run.config.warm_start.num_steps:
        run.bank.load(Role.STUDENT, run.bank.tensors(Role.AVERAGE))
    run.start_stage()


def _look_after(run: Run, metrics: Metrics) -> None:
    """Meters, evaluation, sample grid, metrics line and checkpoint, each when it is due.

    The checkpoint comes last: whatever it says was done has been done.
    """
    config, step = run.config, run.step
    is_last = step == config.num_steps

    def is_due(every: int) -> bool:
        return every > 0 and (step % every == 0 or is_last)

    if is_due(config.evaluation.every):
        metrics |= run.meters()
        metrics |= run.evaluate()
    if is_due(config.sample_every):
        prompts = [i % len(run.setting.book.prompts) for i in range(GRID_IMAGES)]
        images = run.backbone.decode(run.sample(prompts, GRID_SEED))
        run.folder.save_grid(step, images.numpy(), GRID_COLUMNS)
    run.folder.log(step, metrics)
    if is_due(config.checkpoint_every):
        run.save()


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C asks for a stop after the current step; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(signum: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        logger.warning("stopping after this step; press Ctrl-C again to stop at once")
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
