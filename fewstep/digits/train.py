"""`python -m fewstep.digits.train`: train classifier, autoencoder and both teachers from scratch.

The shipped weights come from `python -m fewstep.digits.train --out weights` (seed 0, two CPU
cores). Minutes on that machine are in docs/digits.md. Each part can be run alone; parts that are
there already in --out are kept.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from fewstep.digits.autoencoder import encode_all, train_autoencoder
from fewstep.digits.classifier import DigitClassifier, accuracy, train_classifier
from fewstep.digits.data import Digits, load_digits
from fewstep.digits.teachers import build_sd3, build_sd15, train_teacher
from fewstep.digits.weight_files import (
    read_autoencoder,
    read_text_encoder,
    write_autoencoder,
    write_teacher,
)

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class DigitsTraining:
    """Train the digits pipeline's parts on the real handwritten digits of scikit-learn."""

    out: Path = Path("digits-weights")
    """Where classifier.safetensors, vae/, sd3/, sd15/ and the curves go."""
    seed: int = 0
    """Initial weights, batches and noise."""
    classifier_steps: int = 2000
    """64 pictures each; about half a minute on two cores."""
    autoencoder_steps: int = 2000
    """16 crops each; about 7 minutes."""
    sd3_steps: int = 8000
    """128 latents each; about 15 minutes."""
    sd15_steps: int = 3500
    """64 latents each; about 15 minutes. Its text encoder starts from the SD3 teacher's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = tyro.cli(DigitsTraining, args=argv, prog="fewstep.digits.train")
    options.out.mkdir(parents=True, exist_ok=True)
    train_all(options, Console(stderr=True))
    return 0


def train_all(options: DigitsTraining, console: Console) -> None:
    """Train what is not in `options.out` yet, in order."""
    digits = load_digits()
    parts: dict[str, Callable[[Report], dict[str, float]]] = {
        "classifier": lambda report: _classifier(options, digits, report),
        "vae": lambda report: _autoencoder(options, digits, report),
        "sd3": lambda report: _teacher("sd3", options, digits, report),
        "sd15": lambda report: _teacher("sd15", options, digits, report),
    }
    lengths = {
        "classifier": options.classifier_steps,
        "vae": options.autoencoder_steps,
        "sd3": options.sd3_steps,
        "sd15": options.sd15_steps,
    }
    for name, train in parts.items():
        if (options.out / f"{name}.json").exists():
            console.print(f"{name}: already trained, kept")
        else:
            _train_part(name, train, lengths[name], options, console)


def _train_part(
    name: str,
    train: Callable[[Report], dict[str, float]],
    num_steps: int,
    options: DigitsTraining,
    console: Console,
) -> None:
    """Train one part under a progress bar; write its curve and, last, its figures."""
    curve: list[dict[str, float]] = []
    started = time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task(name, total=num_steps)

        def report(step: int, metrics: dict[str, float]) -> None:
            curve.append({"step": step, **metrics})
            progress.update(task, completed=step + 1)

        result = train(report)
    result["minutes"] = (time.perf_counter() - started) / 60.0
    _save_curve(options.out / f"{name}.png", curve)
    text = json.dumps({"steps": num_steps, "seed": options.seed, **result}, indent=1)
    (options.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    console.print(f"{name}: {json.dumps(result)}")


def _classifier(options: DigitsTraining, digits: Digits, report: Report) -> dict[str, float]:
    model = train_classifier(
        digits, num_steps=options.classifier_steps, seed=options.seed, report=report
    )
    file = options.out / "classifier.safetensors"
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    save_file(half, file)
    shipped = DigitClassifier()
    shipped.load_state_dict({name: value for name, value in load_file(file).items()})
    return {"held_out_accuracy": accuracy(shipped.float(), digits.held_out())}


def _autoencoder(options: DigitsTraining, digits: Digits, report: Report) -> dict[str, float]:
    model = train_autoencoder(
        digits, num_steps=options.autoencoder_steps, seed=options.seed, report=report
    )
    write_autoencoder(model, options.out / "vae")
    return {}


def _teacher(
    kind: str, options: DigitsTraining, digits: Digits, report: Report
) -> dict[str, float]:
    vae = read_autoencoder(options.out / "vae")
    latents, labels = encode_all(vae, digits), torch.as_tensor(digits.labels)
    torch.manual_seed(options.seed)
    is_sd3 = kind == "sd3"
    pipe = build_sd3(vae) if is_sd3 else build_sd15(vae, read_text_encoder(options.out / "sd3"))
    train_teacher(
        pipe,
        latents,
        labels,
        num_steps=options.sd3_steps if is_sd3 else options.sd15_steps,
        batch_size=128 if is_sd3 else 64,
        learning_rate=1.5e-3 if is_sd3 else 1e-3,
        ema_decay=0.9993 if is_sd3 else 0.999,
        seed=options.seed + 1,
        report=report,
    )
    shutil.rmtree(options.out / kind, ignore_errors=True)
    write_teacher(pipe, options.out / kind)
    return {}


def _save_curve(file: Path, curve: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name in curve[0]:
        if name != "step":
            axes.plot([r["step"] for r in curve], [r[name] for r in curve], label=name, lw=0.8)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
