"""Time of one optimizer step of the trainer against the bare network calls inside it.

    python benchmarks/trainer_step.py                              the shipped digits teacher
    python benchmarks/trainer_step.py --model digits-sd15
    python benchmarks/trainer_step.py --model FOLDER --batch-size 1 --size-px 512

Every network call of a step is recorded (role, inputs, with or without gradient) and, right after
the step, made again on its own: forward, and backward where the step had one. What the step took
beyond the sum of those is the trainer's own: draws, step arithmetic, losses, clipping, AdamW, the
moving average and the metrics line. Steps and replays alternate, so a busy machine slows both;
the verdict is on the median ratio of each stage.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.trainer.config import DataConfig, TrainConfig
from fewstep.trainer.loop import advance
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from fewstep.trainer.recipes import RECIPES
from fewstep.trainer.roles import Role, acting_as, current_role
from fewstep.trainer.run import Run
from fewstep.trainer.run_state import save_run
from fewstep.trainer.setup import build_run

LIMIT = 1.15
PROMPTS = ("one", "two", "three", "four")


@dataclass(frozen=True, slots=True)
class Call:
    """One network call of a step."""

    role: Role
    with_grad: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recorder:
    """Notes every call of the denoiser while it is on.

    Args:
        denoiser: The network to listen to.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.calls: list[Call] = []
        self.is_on = False
        denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.is_on:
            self.calls.append(Call(current_role(), torch.is_grad_enabled(), args, kwargs))


def main() -> int:
    """Measure both stages, print the table, write the JSON; 0 when the limit holds."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        config = _config(arguments, Path(folder))
        run = build_run(config)
        recorder = Recorder(run.backbone.denoiser)
        stages = {
            "warm start": _measure(run, recorder, arguments.repeats),
            "distribution matching": _measure(run, recorder, arguments.repeats),
        }
        save_s = _timed(run, lambda: save_run(run))
    report = {
        "model": arguments.model,
        "batch_size": config.batch_size,
        "device": str(run.backbone.device),
        "threads": torch.get_num_threads(),
        "limit": LIMIT,
        "passed": all(stage["ratio"]["median"] <= LIMIT for stage in stages.values()),
        "stages": stages,
        "checkpoint_s": save_s,
        "checkpoint_every": config.checkpoint_every,
    }
    print_table(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["passed"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="digits-sd3", help="as the trainer's --model")
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size)
    parser.add_argument("--size-px", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps per stage")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def _config(arguments: argparse.Namespace, folder: Path) -> TrainConfig:
    """The digits recipe with just enough steps, and without evaluations in between."""
    config = RECIPES["digits-4step"].config
    steps, method = arguments.repeats + 1, config.method
    assert isinstance(method, WarmDmd2)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return dataclasses.replace(
        config,
        model=arguments.model,
        out=folder / "run",
        data=DataConfig(prompts="" if arguments.model.startswith("digits-") else str(prompts)),
        batch_size=arguments.batch_size,
        size_px=arguments.size_px,
        device=arguments.device,
        gradient_checkpointing=arguments.gradient_checkpointing,
        sample_every=0,
        method=dataclasses.replace(
            method,
            warm_start=dataclasses.replace(method.warm_start, num_steps=steps),
            match=dataclasses.replace(method.match, num_steps=steps, critic_warmup=0),
        ),
        evaluation=dataclasses.replace(config.evaluation, every=0),
    )


def _measure(run: Run, recorder: Recorder, repeats: int) -> dict[str, Any]:
    """One stage: a step that is not timed, then steps and replays in turn."""
    steps, replays, counts = [], [], Counter()
    for index in range(repeats + 1):
        recorder.calls = []
        recorder.is_on = True
        step_s = _timed(run, lambda: run.folder.log(run.step, advance(run)))
        recorder.is_on = False
        replay_s = sum(_replay(run, call) for call in recorder.calls)
        if index:
            steps.append(step_s)
            replays.append(replay_s)
            counts.update(_kind(call) for call in recorder.calls)
    ratios = [step / replay for step, replay in zip(steps, replays, strict=True)]
    return {
        "step_s": spread(steps),
        "network_s": spread(replays),
        "ratio": spread(ratios),
        "calls_per_step": {kind: count / repeats for kind, count in sorted(counts.items())},
    }


def _replay(run: Run, call: Call) -> float:
    """Seconds of one bare call, backward included where the step had one."""

    def bare() -> None:
        with acting_as(call.role), torch.set_grad_enabled(call.with_grad):
            output = run.backbone.denoiser(*call.args, **call.kwargs)[0]
        if call.with_grad:
            output.backward(torch.ones_like(output))

    seconds = _timed(run, bare)
    if call.with_grad:
        for parameter in run.setting.cast.parameters(call.role):
            parameter.grad = None  # as the trainer leaves them
    return seconds


def _timed(run: Run, action: Any) -> float:
    """Wall seconds, queued GPU work included."""
    is_cuda = run.backbone.device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _kind(call: Call) -> str:
    sample = call.args[0] if call.args else call.kwargs["hidden_states"]
    passes = "forward + backward" if call.with_grad else "forward"
    return f"{call.role.name} {passes}, batch {len(sample)}"


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartile_low": low, "quartile_high": high}


def print_table(report: dict[str, Any]) -> None:
    """What was measured, per stage."""
    print(f"{report['model']}, batch {report['batch_size']}, {report['device']}")
    print(f"{'stage':24}{'step':>12}{'network':>12}{'ratio':>10}   quartiles")
    for name, stage in report["stages"].items():
        step, network, ratio = (stage[k] for k in ("step_s", "network_s", "ratio"))
        print(
            f"{name:24}{1e3 * step['median']:9.1f} ms{1e3 * network['median']:9.1f} ms"
            f"{ratio['median']:10.3f}   {ratio['quartile_low']:.3f} to {ratio['quartile_high']:.3f}"
        )
        for kind, count in stage["calls_per_step"].items():
            print(f"    {count:5.2f} x {kind}")
    save_ms, every = 1e3 * report["checkpoint_s"], report["checkpoint_every"]
    print(f"checkpoint: {save_ms:.1f} ms, every {every} steps")
    print(f"limit {report['limit']:.2f}: {'passed' if report['passed'] else 'FAILED'}")


if __name__ == "__main__":
    sys.exit(main())
