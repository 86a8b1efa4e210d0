"""Measures every scheduler, solver and inference option on the digits teachers: docs/methods.md.

    python benchmarks/methods.py --base digits-sd3 --student demo-out/adapter/student.safetensors

Every row is 1000 pictures per seed, judged against the real handwriting. Searches and fits are made
again for every seed, from other noise than the pictures'. Rows already in --out are kept, so a run
that was stopped goes on; `--table` only prints what is there. One core: about an hour per base.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.cli.bases import resolve_base
from fewstep.digits.data import balanced_prompts
from fewstep.digits.draw import generate_images, picture_seeds
from fewstep.digits.evaluate import judge_stock_teacher
from fewstep.digits.judge import DigitsJudge
from fewstep.digits.teacher_rows import GUIDANCE_SCALES
from fewstep.digits.teacher_sampler import load_teacher, schedule_of
from fewstep.pipeline import FewStepPipeline
from fewstep.pipeline.teacher_refine import TeacherRefine
from fewstep.recipe import FewStepRecipe, Sampler
from fewstep.solvers.flow_frame import even_levels, grid_of
from fewstep.solvers.problem import FitSettings, Problem, prepare
from fewstep.solvers.training_free import fitted_recipe, searched_recipe

CALLS = (2, 4, 8)
BATCH_SIZE = 20
"""A decoder's activations of more pictures than this leave the processor's cache."""
FIT_PICTURES = {"digits-sd3": 20, "digits-sd15": 10}
"""The UNet costs several times the transformer; fits call it thousands of times."""
FIT_SEED = 400_000_000
"""Noise of searches and fits; no evaluation reaches it."""
LADDERS = {
    2: (0.5, 1.0),
    4: (0.5, 0.5, 0.75, 1.0),
    8: (0.5, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0, 1.0),
}
CLIP = 2.0
"""Latents here have deviation 1."""
ORDER = (
    "stock scheduler",
    "even grid, Euler/DDIM",
    "trained grid, Euler/DDIM",
    "noise correction",
    "optimal steps (OSS)",
    "D-ODE on the even grid",
    "D-ODE on optimal steps",
    "Bespoke RK1",
    "Bespoke RK2 (half the steps)",
    "TCD gamma 0.3",
    f"TCD gamma 0.3, x0 clip {CLIP:g} (TDD)",
    "re-noising (gamma 1)",
    "scale ladder",
    "teacher refine 0.1",
    "teacher refine 0.3",
)
FIGURES = ("frechet", "accuracy", "recall", "diversity", "seconds_per_image")
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all rows of one base share."""

    base: str
    judge: DigitsJudge
    num_images: int
    student: Path | None

    @property
    def guidance_scale(self) -> float:
        return GUIDANCE_SCALES[self.base.removeprefix("digits-")]


@dataclass(frozen=True)
class Case:
    """One method at one number of network calls; `draw` gives (scores and seconds, NFE)."""

    network: str
    method: str
    calls: int
    measure: Callable[[], Row]


def teacher_cases(bench: Bench, seed: int) -> Iterator[Case]:
    """Training-free methods, on the teacher with its own guidance."""
    problem = fit_problem(bench, seed)
    even = even_recipe(problem)
    searched = functools.cache(lambda: searched_recipe(problem, CALLS))
    recipes: dict[str, Callable[[], FewStepRecipe]] = {
        "even grid, Euler/DDIM": lambda: even,
        "optimal steps (OSS)": searched,
        "D-ODE on the even grid": lambda: fitted_recipe(problem, "d-ode", CALLS),
        "D-ODE on optimal steps": lambda: fitted_recipe(problem, "d-ode", CALLS, on=searched()),
        "Bespoke RK1": lambda: fitted_recipe(problem, "bespoke-rk1", CALLS),
        "Bespoke RK2 (half the steps)": lambda: fitted_recipe(problem, "bespoke-rk2", CALLS),
    }
    if even.base.schedule.kind == "vp":  # at sigma 1 of a flow model it changes nothing
        corrected = dataclasses.replace(even, sampler=Sampler(noise_correction=True))
        recipes["noise correction"] = lambda: corrected
    once = {name: functools.cache(recipe) for name, recipe in recipes.items()}
    for calls in CALLS:
        yield Case("teacher", "stock scheduler", calls, lambda n=calls: stock_row(bench, n, seed))
        for name, recipe in once.items():
            yield Case(
                "teacher",
                name,
                calls,
                lambda n=calls, r=recipe: recipe_row(bench, r(), n, seed, adapter=None),
            )


def student_cases(bench: Bench, seed: int) -> Iterator[Case]:
    """Sampling options, on a student distilled into 4 deterministic steps without guidance."""
    trained = FewStepPipeline.wrap(load_teacher(resolve_base(bench.base)), adapter=bench.student)
    plain = dataclasses.replace(trained.recipe, grids=student_grids(bench, trained.recipe))
    ladder = dataclasses.replace(
        plain,
        sampler=Sampler(stochasticity=1.0),
        grids=tuple(dataclasses.replace(g, sizes=LADDERS[g.num_steps]) for g in plain.grids),
    )
    options: dict[str, tuple[FewStepRecipe, Any]] = {
        "trained grid, Euler/DDIM": (plain, None),
        "TCD gamma 0.3": (with_sampler(plain, stochasticity=0.3), None),
        f"TCD gamma 0.3, x0 clip {CLIP:g} (TDD)": (
            with_sampler(plain, stochasticity=0.3, clip_x0=CLIP),
            None,
        ),
        "re-noising (gamma 1)": (with_sampler(plain, stochasticity=1.0), None),
        "scale ladder": (ladder, None),
        "teacher refine 0.1": (plain, TeacherRefine(scale=0.1)),
        "teacher refine 0.3": (plain, TeacherRefine(scale=0.3)),
    }
    for calls in CALLS:
        for name, (recipe, refine) in options.items():
            yield Case(
                "student",
                name,
                calls,
                lambda n=calls, r=recipe, t=refine: recipe_row(
                    bench, r, n, seed, adapter=bench.student, refine=t
                ),
            )


def load_base(name: str) -> Any:
    """A fresh teacher; its decoder in the layout that is fastest on CPUs."""
    pipe = load_teacher(resolve_base(name))
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def fit_problem(bench: Bench, seed: int) -> Problem:
    prompts, _ = balanced_prompts(FIT_PICTURES[bench.base])
    settings = FitSettings(
        prompts=tuple(prompts),
        guidance_scale=bench.guidance_scale,
        seed=FIT_SEED + 1000 * seed,
        batch_size=BATCH_SIZE,
        max_sequence_length=1 if bench.base == "digits-sd3" else None,
    )
    return prepare(load_teacher(resolve_base(bench.base)), settings, name=bench.base)


def even_recipe(problem: Problem) -> FewStepRecipe:
    grids = tuple(grid_of(even_levels(problem.schedule, calls)) for calls in CALLS)
    return FewStepRecipe(
        base=problem.base, grids=grids, default_steps=CALLS[-1], guidance=problem.guidance
    )


def student_grids(bench: Bench, recipe: FewStepRecipe) -> tuple[Any, ...]:
    """The grid it was trained on, and the even ones of its teacher's schedule for other counts.

    The recipe's own schedule would not do: its shift is 1 where the stored grid is already shifted.
    """
    schedule = schedule_of(load_base(bench.base))
    trained = {grid.num_steps: grid for grid in recipe.grids}
    return tuple(trained.get(n) or grid_of(even_levels(schedule, n)) for n in CALLS)


def with_sampler(recipe: FewStepRecipe, **options: Any) -> FewStepRecipe:
    return dataclasses.replace(recipe, sampler=Sampler(**options))


def stock_row(bench: Bench, calls: int, seed: int) -> Row:
    judged = judge_stock_teacher(
        load_base(bench.base),
        bench.judge,
        num_steps=calls,
        guidance_scale=bench.guidance_scale,
        num_images=bench.num_images,
        seed=seed,
    )
    return {"nfe": judged.row.nfe, **{name: getattr(judged.row, name) for name in FIGURES}}


def recipe_row(
    bench: Bench,
    recipe: FewStepRecipe,
    calls: int,
    seed: int,
    *,
    adapter: Path | None,
    refine: TeacherRefine | None = None,
) -> Row:
    pipe = FewStepPipeline.wrap(load_base(bench.base), recipe=recipe, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    prompts, labels = balanced_prompts(bench.num_images)
    options: dict[str, Any] = {"num_inference_steps": calls}
    if refine is not None:
        options["teacher_refine"] = refine
    drawn = generate_images(
        pipe,
        prompts,
        picture_seeds(seed, bench.num_images),
        options=options,
        batch_size=BATCH_SIZE,
    )
    scores = dataclasses.asdict(bench.judge.score(drawn.images, labels))
    nfe = recipe.nfe(calls) + (refine.steps if refine else 0)
    figures = {name: scores[name] for name in FIGURES if name in scores}
    return {"nfe": nfe, **figures, "seconds_per_image": drawn.seconds_per_image}


def measure(bench: Bench, seeds: tuple[int, ...], rows: str, out: Path) -> None:
    """Measure what is missing; the file is written anew after every row."""
    for seed in seeds:
        for cases in wanted(bench, rows):
            known = {key_of(row) for row in read(out)["rows"]}
            for case in cases(bench, seed):
                key = (bench.base, case.network, case.method, case.calls, seed, bench.num_images)
                if key in known:
                    continue
                row = dict(zip(KEYS, key, strict=True)) | case.measure()
                print(json.dumps(row), flush=True)
                add(out, row)


def wanted(bench: Bench, rows: str) -> list[Callable[[Bench, int], Iterator[Case]]]:
    chosen: list[Callable[[Bench, int], Iterator[Case]]] = []
    if rows in ("all", "teacher"):
        chosen.append(teacher_cases)
    if rows in ("all", "student"):
        if bench.student is None:
            raise SystemExit("student rows need --student (make one: fewstep demo --quick)")
        chosen.append(student_cases)
    return chosen


KEYS = ("base", "network", "method", "calls", "seed", "num_images")


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEYS)


def read(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}


def add(out: Path, row: Row) -> None:
    data = read(out)
    data["rows"] = sorted([*data["rows"], row], key=lambda r: tuple(map(str, key_of(r))))
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out)


def write_page(page: Path, rows: list[Row]) -> None:
    """Put the tables of all rows between their markers in a page."""
    text = page.read_text(encoding="utf-8")
    for base, network in dict.fromkeys((row["base"], row["network"]) for row in rows):
        start, end = marker(base, network), "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found:
            raise SystemExit(f"{page} has no line {start}; add it where the table belongs")
        text = f"{before}{start}\n{table(rows, base, network)}\n{end}{rest.partition(end)[2]}"
    page.write_text(text, encoding="utf-8")


def marker(base: str, network: str) -> str:
    return f"<!-- rows: {base} {network} -->"


def table(rows: list[Row], base: str, network: str) -> str:
    """Markdown: Frechet distance as mean +- standard deviation over seeds, per number of calls."""
    mine = [row for row in rows if (row["base"], row["network"]) == (base, network)]
    methods = sorted({row["method"] for row in mine}, key=ORDER.index)
    heads = [*(f"{calls} calls" for calls in CALLS), "accuracy at 4", "recall at 4"]
    lines = ["| method | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for method in methods:
        of = {n: [r for r in mine if (r["method"], r["calls"]) == (method, n)] for n in CALLS}
        cells = [cell([r["frechet"] for r in of[calls]]) for calls in CALLS]
        cells += [plain_mean([r[name] for r in of[4]]) for name in ("accuracy", "recall")]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain_mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" if values else "-"


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} +- {spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", choices=sorted(f"digits-{k}" for k in GUIDANCE_SCALES))
    parser.add_argument("--student", type=Path)
    parser.add_argument("--rows", choices=["all", "teacher", "student"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("docs/methods.json"))
    parser.add_argument("--table", action="store_true", help="print what --out holds, and stop")
    parser.add_argument("--page", type=Path, help="put the tables into this page")
    options = parser.parse_args()
    if options.base and not options.table:
        bench = Bench(
            options.base,
            DigitsJudge(),
            options.num_images,
            options.student,
        )
        measure(bench, tuple(options.seeds), options.rows, options.out)
    rows = read(options.out)["rows"]
    for base, network in dict.fromkeys((row["base"], row["network"]) for row in rows):
        print(f"\n{base}, {network}\n\n{table(rows, base, network)}")
    if options.page is not None:
        write_page(options.page, rows)


if __name__ == "__main__":
    main()
