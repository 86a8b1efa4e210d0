"""Makes report rows: one sampler of digits, judged against the real handwriting.

The same prompts and seeds serve every row, so rows differ by the sampler alone. Writes no files.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusion3Pipeline
from rich.progress import Progress

from fewstep.digits.data import balanced_prompts
from fewstep.digits.draw import Drawn, generate_images, picture_seeds
from fewstep.digits.judge import DigitsJudge, Scores
from fewstep.digits.rows import Row
from fewstep.digits.teacher_sampler import (
    DigitsPipeline,
    load_teacher,
    nfe_of_teacher,
    teacher_images,
)
from fewstep.digits.teachers import T5_LENGTH
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import FewStepRecipe

NUM_IMAGES = 2000


@dataclass(frozen=True, slots=True)
class Judged:
    """A row and the pictures it judges, shape (N, 64, 64, 3), uint8."""

    row: Row
    images: np.ndarray


def judge_teacher(
    pipe: DigitsPipeline,
    judge: DigitsJudge,
    *,
    num_steps: int,
    guidance_scale: float,
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judged:
    """Sample and judge a teacher; see `teacher_images` for how it is sampled."""
    prompts, labels = balanced_prompts(num_images)
    drawn = teacher_images(
        pipe,
        prompts,
        picture_seeds(seed, num_images),
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        progress=progress,
    )
    sampler = "euler" if isinstance(pipe, StableDiffusion3Pipeline) else "ddim"
    row = _teacher_row(judge.score(drawn.images, labels), drawn, sampler, num_steps, guidance_scale)
    return Judged(dataclasses.replace(row, seed=seed), drawn.images)


def judge_stock_teacher(
    pipe: DigitsPipeline,
    judge: DigitsJudge,
    *,
    num_steps: int,
    guidance_scale: float,
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judged:
    """Judge a teacher as its stock pipeline and scheduler sample it: what its users get."""
    prompts, labels = balanced_prompts(num_images)
    options: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    if isinstance(pipe, StableDiffusion3Pipeline):
        options["max_sequence_length"] = T5_LENGTH
    pipe.set_progress_bar_config(disable=True)
    drawn = generate_images(
        pipe, prompts, picture_seeds(seed, num_images), options=options, progress=progress
    )
    sampler = f"stock {type(pipe.scheduler).__name__}"
    row = _teacher_row(judge.score(drawn.images, labels), drawn, sampler, num_steps, guidance_scale)
    return Judged(dataclasses.replace(row, seed=seed), drawn.images)


def _teacher_row(
    scores: Scores, drawn: Drawn, sampler: str, num_steps: int, guidance_scale: float
) -> Row:
    return Row(
        **dataclasses.asdict(scores),
        name="teacher",
        steps=num_steps,
        nfe=nfe_of_teacher(num_steps, guidance_scale),
        guidance_scale=guidance_scale,
        seconds_per_image=drawn.seconds_per_image,
        num_images=len(drawn.images),
        sampler=sampler,
        seed=0,
    )


def judge_student(
    pipe: FewStepPipeline,
    judge: DigitsJudge,
    *,
    num_steps: int,
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judged:
    """Sample and judge a student.

    Args:
        pipe: From `load_student`.
        judge: The judge.
        num_steps: A step count of the pipeline's recipe.
        num_images: Pictures, classes balanced.
        seed: Evaluation seed; see `picture_seeds`.
        progress: Where to show a bar.
    """
    prompts, labels = balanced_prompts(num_images)
    recipe = pipe.recipe
    drawn = generate_images(
        pipe,
        prompts,
        picture_seeds(seed, num_images),
        options={"num_inference_steps": recipe.grid(num_steps).num_steps},
        progress=progress,
    )
    row = Row(
        **dataclasses.asdict(judge.score(drawn.images, labels)),
        name="student",
        steps=num_steps,
        nfe=recipe.nfe(num_steps),
        guidance_scale=recipe.guidance.scale,
        seconds_per_image=drawn.seconds_per_image,
        num_images=num_images,
        sampler=sampler_name(recipe),
        seed=seed,
    )
    return Judged(row, drawn.images)


def judge_real(judge: DigitsJudge, seed: int = 0) -> Row:
    """The floor as a row: half of the real digits, judged by the other half."""
    return Row(
        **dataclasses.asdict(judge.floor(seed)),
        name="real",
        steps=0,
        nfe=0,
        seconds_per_image=0.0,
        num_images=judge.num_real // 2,
        guidance_scale=1.0,
        sampler="none",
        seed=seed,
    )


def load_student(
    base: Path | str, adapter: Path | str, recipe: FewStepRecipe | None = None
) -> FewStepPipeline:
    """A digits teacher with a few-step adapter, in float32 and quiet.

    Args:
        base: The teacher's folder.
        adapter: The adapter file.
        recipe: In place of the file's own, for example with further step counts.

    Raises:
        PipelineError: The folder holds no digits teacher.
        AdapterError: The adapter is damaged or does not fit.
        RecipeNotFoundError: Nothing says how to sample it.
    """
    # No probe: what an adapter without effect scores is its teacher's score, not an error.
    pipe = FewStepPipeline.wrap(load_teacher(base), adapter=adapter, recipe=recipe, probe=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampler_name(recipe: FewStepRecipe) -> str:
    """How a recipe makes a step, in a word: "euler", "ddim", "renoise" or "gamma 0.3"."""
    stochasticity = recipe.sampler.stochasticity
    if stochasticity == 0.0:
        return "ddim" if recipe.base.schedule.kind == "vp" else "euler"
    return "renoise" if stochasticity == 1.0 else f"gamma {stochasticity:g}"


def evaluate_adapter(
    base: Path | str,
    adapter: Path | str,
    steps: Sequence[int] = (),
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    *,
    recipe: FewStepRecipe | None = None,
    teacher_steps: Sequence[int] = (),
    guidance_scale: float = 1.0,
    judge: DigitsJudge | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge an adapter at several step counts, beside its teacher and the real floor.

    Args:
        base: The teacher's folder.
        adapter: The adapter file.
        steps: Student step counts; none means the recipe's default.
        num_images: Pictures per row, classes balanced.
        seed: Evaluation seed; see `picture_seeds`.
        recipe: In place of the file's own, for example with further step counts.
        teacher_steps: Step counts of teacher rows.
        guidance_scale: The teacher rows' scale.
        judge: A judge to use again; by default a new one with the shipped classifier.
        progress: Where to show bars.

    Returns:
        JSON values: base, adapter, num_images, seed, frechet_floor (what a perfect sampler would
        score with as many pictures) and rows, teacher first, then student, then real.
    """
    pipe = load_student(base, adapter, recipe)
    judge = judge or DigitsJudge()
    common: dict[str, Any] = {"num_images": num_images, "seed": seed, "progress": progress}
    rows: list[Row] = []
    if teacher_steps:
        teacher = load_teacher(base)
        rows += [
            judge_teacher(
                teacher, judge, num_steps=count, guidance_scale=guidance_scale, **common
            ).row
            for count in teacher_steps
        ]
    counts = steps or (pipe.recipe.default_steps,)
    rows += [judge_student(pipe, judge, num_steps=count, **common).row for count in counts]
    rows.append(judge_real(judge, seed))
    return {
        "base": str(base),
        "adapter": str(adapter),
        "num_images": num_images,
        "seed": seed,
        "frechet_floor": judge.frechet_floor(num_images, seed=seed),
        "rows": [row.to_dict() for row in rows],
    }
