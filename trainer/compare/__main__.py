"""`python -m fewstep.trainer.compare`: all methods on the digits teachers, one budget, one page."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress

from fewstep.errors import ConfigError, FewstepError
from fewstep.trainer.compare.entries import DEFAULTS, MODELS, Entry, entries
from fewstep.trainer.methods.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train every method under an equal budget of network evaluations and write the tables."""

    out: Path = Path("runs/compare")
    """Folder of the runs. Finished ones are not repeated."""
    models: tuple[str, ...] = MODELS
    """Teachers."""
    methods: tuple[str, ...] = ()
    """Names; empty takes all, and the recommendations."""
    budget: int = 60_000
    """Network evaluations per run: samples times calls of teacher, student and critic."""
    num_seeds: int = 3
    """Seeds of the main ten and the recommendations; the others run once."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    page: Path | None = None
    """Markdown page whose tables are written; figures beside it as methods-trained.json."""
    only_page: bool = False
    """Run nothing; write the page from what is there."""
    one: str = ""
    """MODEL/METHOD/SEED: this run alone, in this process."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 some run failed, 2 user error)."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    console = Console(stderr=True)
    try:
        config = tyro.cli(
            CompareConfig, args=argv, prog="fewstep.trainer.compare", description=__doc__
        )
        if config.one:
            return run_one(config)
        failed = [] if config.only_page else run_all(config, console)
        if config.page is not None:
            write_page(config)
    except FewstepError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    for name in failed:
        console.print(f"failed: {name} (see its log.txt)", style="red")
    return 1 if failed else 0


def run_one(config: CompareConfig) -> int:
    """One run in this process."""
    from fewstep.trainer.compare.measure import measure

    model, name, seed = config.one.split("/")
    result = measure(Entry(name, model, int(seed)), config.out, config.budget)
    print(json.dumps({"name": name, **{k: v["frechet"] for k, v in result["scores"].items()}}))
    return 0


def run_all(config: CompareConfig, console: Console) -> list[str]:
    """Every run that is not done yet, each in a process of its own; returns those that failed."""
    known = (*DEFAULTS, *METHODS)
    for name in config.methods:
        if name not in known:
            raise ConfigError(f"method {name!r} is unknown; use some of {', '.join(known)}")
    wanted = entries(config.models, config.methods or known, config.num_seeds)
    todo = [e for e in wanted if not (e.folder(config.out) / "result.json").exists()]
    failed: list[str] = []
    with Progress(console=console) as progress, ThreadPoolExecutor(config.jobs) as pool:
        task = progress.add_task("comparing", total=len(todo))
        for entry, code in zip(todo, pool.map(lambda e: _in_process(config, e), todo), strict=True):
            progress.advance(task)
            if code:
                failed.append(f"{entry.model}/{entry.name}/{entry.seed}")
    return failed


def _in_process(config: CompareConfig, entry: Entry) -> int:
    folder = entry.folder(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "fewstep.trainer.compare", "--out", str(config.out),
        "--budget", str(config.budget), "--one", f"{entry.model}/{entry.name}/{entry.seed}",
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": "1"}  # one core per run, or parallel runs fight for them
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        done = subprocess.run(
            command, stdout=log, stderr=log, check=False, env={**os.environ, **threads}
        )
    return done.returncode


def write_page(config: CompareConfig) -> None:
    """Tables, figures and curves from every result that is there."""
    from fewstep.trainer.compare.measure import results
    from fewstep.trainer.compare.page import write_tables
    from fewstep.trainer.compare.plots import save_curves
    from fewstep.trainer.run_folder import write_text

    found = results(config.out)
    if not found or config.page is None:
        raise ConfigError(f"{config.out} has no results yet; run the comparison first")
    write_tables(config.page, found)
    write_text(config.page.with_name("methods-trained.json"), json.dumps(found, indent=1) + "\n")
    images = config.page.parent / "images"
    images.mkdir(exist_ok=True)
    for model in sorted({result["model"] for result in found}):
        rows = [result for result in found if result["model"] == model]
        title = f"{model}, {rows[0]['budget']} network evaluations per run"
        save_curves(images / f"methods-{model}.png", rows, title)


if __name__ == "__main__":
    sys.exit(main())
