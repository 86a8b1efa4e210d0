"""A run's state as a checkpoint and back, exactly."""

from collections import Counter

from torch import Tensor

from fewstep.trainer import checkpoint as ckpt
from fewstep.trainer.roles import Role
from fewstep.trainer.run import Run


def save_run(run: Run) -> None:
    """Write a checkpoint of everything the next step depends on; all processes call it.

    It does not say how many there are: any number can go on from it.
    """
    spent = sum(run.processes.gathered(run.backbone.evaluations), Counter())
    if run.processes.is_main:
        _write(run, spent)
    run.processes.wait()


def _write(run: Run, spent: Counter[str]) -> None:
    cast = run.setting.cast
    tensors: dict[str, Tensor] = {}
    for name in cast.policies:
        tensors |= ckpt.under(f"role/{name}", cast.tensors(Role(name)))
    for name, module in cast.modules.items():
        tensors |= ckpt.under(f"module/{name}", module.state_dict())
    if run.student is not None:
        tensors |= ckpt.under("student_optimizer", run.student.tensors())
    if run.critic is not None:
        tensors |= ckpt.under("critic_optimizer", run.critic.tensors())
    # clones: roles that share memory (a snapshot just taken) would be refused by safetensors
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    state = {
        "config": run.config.digest(),
        "stage": run.stage_index,
        "stage_step": run.stage_step,
        "stage_start": run.stage_start,
        "evaluations": dict(spent),
        "guard": run.guard.state(),
        "best": run.best if run.best_scores else None,
        "best_scores": run.best_scores,
    }
    ckpt.save(run.folder.checkpoints, ckpt.Checkpoint(run.step, tensors, state))


def restore_run(run: Run, checkpoint: ckpt.Checkpoint) -> None:
    """Continue where a checkpoint was written."""
    tensors, state, cast = checkpoint.tensors, checkpoint.state, run.setting.cast
    run.step = checkpoint.step
    run.stage_index = state["stage"]
    run.stage_step = state["stage_step"]
    run.stage_start = state["stage_start"]
    # the past is kept by one process, whoever spent it
    run.backbone.evaluations = Counter(state["evaluations"] if run.processes.is_main else {})
    run.count_evaluations()
    for name in cast.policies:
        cast.load(Role(name), ckpt.take(tensors, f"role/{name}"))
    for name, module in cast.modules.items():
        module.load_state_dict(ckpt.take(tensors, f"module/{name}"))
    run.make_learners()
    if run.student is not None:
        run.student.load_tensors(ckpt.take(tensors, "student_optimizer"))
    if run.critic is not None:
        run.critic.load_tensors(ckpt.take(tensors, "critic_optimizer"))
    run.guard.restore(state["guard"])
    run.best_scores = state["best_scores"]
    run.best = float("inf") if state["best"] is None else state["best"]
    if run.processes.is_main:
        run.folder.rewind_metrics(run.step)
