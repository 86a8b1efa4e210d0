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
from fewstep.trainer.adapter import product_of
from fewstep.trainer.agreement import agree_on_start
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.meters import peak_memory
from fewstep.trainer.parallel import Processes
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Metrics, Run
from fewstep.trainer.run_state import restore_run, save_run
from fewstep.trainer.setup import build_run

logger = logging.getLogger(__name__)
Report = Callable[[Run, Metrics], None]
GRID_COLUMNS = 10
GRID_IMAGES = 50
GRID_SEED = 900_000_000


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        adapter: The exported file, or the folder of experts' files; None if the run was
            interrupted before one existed.
        steps: Optimizer steps done.
        scores: Scores of the exported adapter.
        was_interrupted: Whether Ctrl-C ended it; run again to continue.
    """

    adapter: Path | None
    steps: int
    scores: dict[str, float]
    was_interrupted: bool


def train(
    config: TrainConfig,
    report: Report = lambda run, metrics: None,
    processes: Processes = Processes(),  # noqa: B008 frozen
) -> TrainResult:
    """Run, or continue, a distillation.

    Several processes call it with the same config; the result does not depend on their number.

    Args:
        config: Everything about the run; `config.out` is where it lives.
        report: Called after every optimizer step with the step's metrics.
        processes: This process among its peers.

    Raises:
        ConfigError: A setting does not fit the model, or processes were started differently.
        CheckpointError: `config.out` holds a run with other settings.
        TrainingError: The run went wrong and its guard says to stop; the last checkpoint is good.
    """
    run = build_run(config, processes)
    found = ckpt.latest(run.folder.checkpoints)
    if found is not None:
        restore_run(run, found)
        logger.info("continuing %s at step %d", config.out, run.step)
    drive(run, report)
    return TrainResult(product_of(config), run.step, run.best_scores, not run.is_done)


def drive(run: Run, report: Report = lambda run, metrics: None) -> None:
    """Take a run to its end, or to the step in which Ctrl-C was pressed, and save it.

    Raises:
        TrainingError: The run went wrong and its guard says to stop; the last checkpoint is good.
    """
    agree_on_start(run)
    with _stop_on_interrupt() as stop:
        while not run.is_done and not run.processes.is_any(stop.is_set()):
            started = time.perf_counter()
            metrics = advance(run)
            metrics["time/step_s"] = time.perf_counter() - started
            metrics |= peak_memory(run.backbone.device)
            _look_after(run, metrics)
            report(run, metrics)
    if not run.is_done:
        save_run(run)
    elif run.evaluator is None and (run.guard.is_healthy or product_of(run.config) is None):
        run.export({})


def advance(run: Run) -> Metrics:
    """One optimizer step of the student, with the critic steps that belong to it."""
    stage, is_first = run.stage, run.stage_step == 0
    before = run.progress
    if is_first:
        _act(run, 0.0, 0.0, is_first=True)
    metrics: Metrics = {"stage": float(run.stage_index)}
    if stage.critic is not None:
        updates = stage.critic.updates + run.guard.extra_critic_updates
        updates += stage.critic.warmup if is_first else 0
        for update in range(updates):
            metrics |= run.update_critic(update + 1)
    if stage.trains_student:
        metrics |= run.update_student()
    if stage.critic is not None and stage.critic.keep < 1.0:
        for critic, student in zip(run.critic_roles(), run.student_roles(), strict=True):
            run.setting.cast.blend(critic, student, stage.critic.keep)
    run.step += 1
    run.stage_step += 1
    metrics = run.processes.mean(metrics)  # the guard must decide the same everywhere
    run.guard.after_step(run.step, metrics)
    metrics["evaluations"] = float(run.evaluations)
    _act(run, before, run.progress, is_first=False)
    if run.progress >= 1.0:
        _next_stage(run)
    return metrics


def _act(run: Run, before: float, now: float, *, is_first: bool) -> None:
    for action in run.stage.due(before, now, is_first=is_first):
        action.act(run.setting.cast)


def _next_stage(run: Run) -> None:
    """The next stage starts from this one's average, with fresh optimizers."""
    cast = run.setting.cast
    if run.stage.trains_student:
        for role in run.student_roles():
            cast.copy(role, Role(role.name.replace(Role.STUDENT.name, Role.AVERAGE.name)))
    run.stage_index += 1
    run.stage_step = 0
    run.stage_start = run.evaluations
    run.guard.new_stage()
    run.make_learners()


def _look_after(run: Run, metrics: Metrics) -> None:
    """Meters, evaluation, sample grid, metrics line and checkpoint, each when it is due.

    All processes come here: they draw pictures together, the main one alone scores and writes.
    The checkpoint comes last: whatever it says was done has been done.
    """
    config, step = run.config, run.step

    def is_due(every: int) -> bool:
        return every > 0 and (step % every == 0 or run.is_done)

    is_main = run.processes.is_main
    if is_due(config.evaluation.every) or is_due(config.sample_every):
        metrics |= run.meters()
        run.guard.after_meters(step, metrics)
    if is_due(config.evaluation.every):
        metrics |= run.evaluate()
    if is_due(config.sample_every):
        prompts = [i % len(run.setting.book.prompts) for i in range(GRID_IMAGES)]
        latents = run.sample(prompts, GRID_SEED)
        if is_main:
            run.folder.save_grid(step, run.backbone.decode(latents).numpy(), GRID_COLUMNS)
    if is_main:
        run.folder.log(step, metrics)
    if is_due(config.checkpoint_every):
        save_run(run)


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
