"""The whole examination: figures, pictures, findings, and the page people read."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.trainer.config import TrainConfig
from fewstep.trainer.doctor.cost import Cost, estimate
from fewstep.trainer.doctor.gradients import GradientRow, gradient_flow
from fewstep.trainer.doctor.probes import (
    MANY_STEPS,
    GuidanceRow,
    bends,
    guidance_probe,
    proposed_gate,
    proposed_timesteps,
    teacher_latents,
)
from fewstep.trainer.meters import ChannelStatistics, channel_drift
from fewstep.trainer.run import Run
from fewstep.trainer.run_folder import tile, write_json
from fewstep.trainer.setup import build_run

GIB = 2**30
WIDE = 3.0
"""A latent channel this far from unit deviation, either way, is a wrong scaling factor."""


@dataclass(frozen=True, slots=True)
class TrainDiagnosis:
    """What was found.

    Attributes:
        findings: (severity, sentence): "error" would spoil the run, "warning" may, "note" helps.
        cost: Memory and time.
        guidance: By noise level.
        gate: Proposed upper end of guidance; None where it does no harm.
        timesteps: Proposed grid.
        gradients: Who learns from what.
        latent_mean: Largest |channel mean| of the teacher's latents.
        latent_std: Smallest and largest channel deviation.
        few_step_drift: Drift of the teacher in the student's step count from itself in many.
        pictures: PNG of the teacher in few and in many steps.
    """

    findings: tuple[tuple[str, str], ...]
    cost: Cost
    guidance: tuple[GuidanceRow, ...]
    gate: float | None
    timesteps: tuple[float, ...]
    gradients: tuple[GradientRow, ...]
    latent_mean: float
    latent_std: tuple[float, float]
    few_step_drift: dict[str, float]
    pictures: Path

    @property
    def has_errors(self) -> bool:
        """Whether something would spoil the run."""
        return any(severity == "error" for severity, _ in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        data = dataclasses.asdict(self)
        data["pictures"] = self.pictures.as_posix()
        data["cost"] |= {
            "peak_bytes": self.cost.peak_bytes,
            "memory_error": self.cost.memory_error,
            "time_errors": [stage.time_error for stage in self.cost.stages],
            "total_hours": self.cost.total_hours,
        }
        return data


def examine(config: TrainConfig, out: Path, *, verify: bool) -> TrainDiagnosis:
    """Examine a run before it starts; writes teacher.png and doctor.json into `out`.

    Args:
        config: The run; its own folder is not touched.
        out: Folder of the report.
        verify: Whether to run one real step, to say how far off the estimates are.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = build_run(dataclasses.replace(config, out=out / "probe"))
    setting, frame = run.setting, run.frame
    many = teacher_latents(setting, frame, MANY_STEPS)
    few = teacher_latents(setting, frame, config.grid.num_steps)
    pictures = save_pictures(run, few, many, out / "teacher.png")
    guidance = guidance_probe(setting, frame, many) if config.guidance_scale != 1.0 else []
    levels, bend = bends(setting, frame)
    gradients = [row for k in range(len(run.stages)) for row in gradient_flow(run, k)]
    statistics = ChannelStatistics.of(many)
    diagnosis = TrainDiagnosis(
        findings=(),
        cost=estimate(run, verify=verify),
        guidance=tuple(guidance),
        gate=proposed_gate(guidance),
        timesteps=proposed_timesteps(levels, bend, config.grid.num_steps),
        gradients=tuple(gradients),
        latent_mean=float(statistics.mean.abs().max()),
        latent_std=(float(statistics.std.min()), float(statistics.std.max())),
        few_step_drift=channel_drift(ChannelStatistics.of(few), statistics),
        pictures=pictures,
    )
    diagnosis = dataclasses.replace(diagnosis, findings=tuple(findings(diagnosis, config)))
    write_json(out / "doctor.json", json.loads(json.dumps(diagnosis.to_dict())))
    return diagnosis


def save_pictures(run: Run, few: torch.Tensor, many: torch.Tensor, file: Path) -> Path:
    """The teacher in the student's steps above, in many steps below; same prompts and seeds."""
    from PIL import Image

    images = torch.cat([run.backbone.decode(few), run.backbone.decode(many)]).numpy()
    Image.fromarray(tile(images, len(few))).save(file)
    return file


def findings(diagnosis: TrainDiagnosis, config: TrainConfig) -> list[tuple[str, str]]:
    """Sentences, worst first."""
    found: list[tuple[str, str]] = []
    for row in diagnosis.gradients:
        if not row.is_right:
            what = "does not learn" if row.expected else "changes"
            found.append(
                ("error", f"role {row.role} {what} in the {row.learner}'s update; report this")
            )
    low, high = diagnosis.latent_std
    if not 1.0 / WIDE < low <= high < WIDE:
        found.append(
            (
                "warning",
                f"the teacher's latent channels deviate by {low:.2f} to {high:.2f}, wanted about "
                "1; check the VAE's scaling_factor and shift_factor",
            )
        )
    if diagnosis.gate is not None:
        found.append(
            (
                "note",
                f"guidance {config.guidance_scale:g} leads away from the teacher's own pictures "
                f"above position {diagnosis.gate:g} of the clock; a gate there "
                "(IntervalGuidance) keeps more modes",
            )
        )
    shown = ", ".join(f"{t:.0f}" for t in diagnosis.timesteps)
    found.append(("note", f"steps that bend alike: --grid.timesteps {shown}"))
    order = ("error", "warning", "note")
    return sorted(found, key=lambda item: order.index(item[0]))


def to_text(diagnosis: TrainDiagnosis) -> str:
    """The page people read."""
    cost = diagnosis.cost
    lines = [
        f"memory on {cost.device}: {cost.peak_bytes / GIB:.2f} GiB "
        f"(weights {cost.weights_bytes / GIB:.2f}, trained {cost.trained_bytes / GIB:.2f})"
        + _off(cost.memory_error),
        f"time: {cost.total_hours:.2f} h in all, evaluations not counted",
        *(
            f"  {stage.name}: {stage.num_steps} steps of {stage.step_s:.2f} s"
            + _off(stage.time_error)
            for stage in cost.stages
        ),
        f"teacher's latents: channel deviations {diagnosis.latent_std[0]:.2f} to "
        f"{diagnosis.latent_std[1]:.2f}, largest mean {diagnosis.latent_mean:.2f}",
        "teacher in the student's steps, drift from itself in many: "
        + ", ".join(f"{k.partition('/')[2]} {v:.2f}" for k, v in diagnosis.few_step_drift.items()),
        f"pictures: {diagnosis.pictures}",
    ]
    if diagnosis.guidance:
        lines.append("guidance, harm by position of the clock (above 1 leads away):")
        lines += [f"  {row.position:.1f}  {row.harm:.2f}" for row in diagnosis.guidance]
    lines.append("who learns from what:")
    for row in diagnosis.gradients:
        mark = "ok" if row.is_right else "WRONG"
        lines.append(f"  {row.learner} update moves {row.role}: {row.moved:.0%}  {mark}")
    lines += [f"{severity}: {sentence}" for severity, sentence in diagnosis.findings]
    return "\n".join(lines)


def _off(error: float | None) -> str:
    return "" if error is None else f"; off by {error:+.0%} against one real step"
