"""What `fewstep grid` and `fewstep solver` share: the base, what to fit on, what is written."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from fewstep.cli.bases import SHIPPED, resolve_base
from fewstep.cli.generate import pick_device
from fewstep.cli.output import Output, OutputOptions, rows_table
from fewstep.cli.picture_folder import SIZE
from fewstep.errors import ConfigError, PipelineError
from fewstep.recipe import FewStepRecipe

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fewstep.solvers.problem import Problem

CAPTIONS = (
    "a lighthouse on a rocky coast at dusk",
    "portrait of an old fisherman, soft window light",
    "a red bicycle leaning against a brick wall",
    "bowl of ramen with an egg, seen from above",
    "a fox in deep snow, wildlife photography",
    "city street in the rain at night, neon signs",
    "watercolour of a mountain lake in autumn",
    "a glass teapot on a wooden table, studio shot",
)
"""Where no prompts are given; a mixed handful serves grids better than one theme."""
COLUMNS = ("calls", "error", "plain_error", "ratio")
"""Errors are mean squared differences to the teacher's latents; plain: without the fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitOptions:
    """Search or fit a few-step recipe for any base, without training."""

    base: str
    """Pipeline folder, Hub id, digits-sd3 or digits-sd15."""
    out: Path
    """Recipe file to write; a plot of the grids goes beside it as .png."""
    steps: tuple[int, ...] = (4,)
    """Network calls per picture; several make one recipe with several grids."""
    prompts: Path | None = None
    """Text file, one prompt per line; a built-in handful where none is given."""
    num_images: int = 16
    """Pictures to fit on; prompts are used in turn."""
    guidance: Annotated[float | None, tyro.conf.arg(metavar="W")] = None
    """w in uncond + w * (cond - uncond), or the embedded scale; the pipeline's own where none."""
    teacher_steps: int = 96
    """Even steps of the teacher; a multiple of --steps is best."""
    seed: int = 0
    """Noise of the first picture; the next has seed + 1."""
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Height and width in pixels, such as 512x768; the pipeline's own where none is given."""
    batch_size: int = 8
    """Pictures per network call; changes memory and speed, not the result."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the first GPU there is."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the networks."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or self.num_images < 1:
            raise ConfigError(
                f"--steps and --num-images must be >= 1, got {list(self.steps)} and "
                f"{self.num_images}"
            )
        if self.size is not None and not SIZE.fullmatch(self.size):
            raise ConfigError(f"--size must be HEIGHTxWIDTH such as 512x768, got {self.size}")
        if self.out.suffix != ".json":
            raise ConfigError(f"--out is a recipe file ending in .json, got {self.out}")


def make_recipe(
    options: FitOptions,
    output: Output,
    *,
    label: str,
    num_calls: int,
    fit: "Callable[[Problem], FewStepRecipe]",
) -> None:
    """Load the base, fit under a progress bar, write the recipe and its plot, say what was won.

    Args:
        options: What the user asked for.
        output: Where to report.
        label: Of the progress bar.
        num_calls: Network calls the fit will make, about.
        fit: From the prepared base to the recipe.

    Raises:
        ConfigError: No such prompts file, or an option out of range.
        PipelineError: The base cannot be loaded or fitted.
    """
    from fewstep.solvers.problem import FitSettings, prepare

    height, width = (None, None)
    if options.size is not None:
        height, width = (int(side) for side in options.size.split("x"))
    settings = FitSettings(
        prompts=read_prompts(options),
        guidance_scale=_guidance(options),
        teacher_steps=options.teacher_steps,
        seed=options.seed,
        batch_size=options.batch_size,
        max_sequence_length=1 if options.base == "digits-sd3" else None,
        height=height,
        width=width,
    )
    with output.progress() as bars:
        task = bars.add_task(label, total=num_calls)
        pipe = _load(options)
        problem = prepare(pipe, settings, name=options.base, on_call=lambda: bars.advance(task))
        recipe = fit(problem)
    write_recipe(options.out, recipe)
    plot = _plot(options.out, recipe)
    rows = _rows(recipe)
    data = {"recipe": str(options.out), "plot": plot, "rows": rows}
    output.result(data, rows_table(rows, COLUMNS))


def read_prompts(options: FitOptions) -> tuple[str, ...]:
    """The prompts of the pictures to fit on.

    Raises:
        ConfigError: The file is missing, not text, or holds none.
    """
    if options.prompts is None:
        known: Sequence[str] = CAPTIONS
        if options.base in SHIPPED:
            from fewstep.digits.data import balanced_prompts

            known, _ = balanced_prompts(options.num_images)
    else:
        try:
            text = options.prompts.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompts {options.prompts} could not be read ({error}); give a text file with "
                "one prompt per line"
            ) from error
        known = [line.strip() for line in text.splitlines() if line.strip()]
        if not known:
            raise ConfigError(f"--prompts {options.prompts} holds no prompt; write one per line")
    return tuple(known[i % len(known)] for i in range(options.num_images))


def write_recipe(path: Path, recipe: FewStepRecipe) -> None:
    """Write a recipe file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(recipe.to_json(indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _guidance(options: FitOptions) -> float | None:
    """Shipped teachers have a scale of their own; stock defaults are far above it."""
    if options.guidance is None and options.base in SHIPPED:
        from fewstep.digits.teacher_rows import GUIDANCE_SCALES

        return GUIDANCE_SCALES[SHIPPED[options.base]]
    return options.guidance


def _load(options: FitOptions) -> "DiffusionPipeline":
    import torch

    from fewstep.loading import load_stock_pipeline

    precisions = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    device, base = pick_device(options.device), resolve_base(options.base)
    try:
        pipe = load_stock_pipeline(base, dtype=precisions[options.precision])
    except (OSError, ValueError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise PipelineError(
            f"could not load the base {base!r}; --base takes a pipeline folder, a Hub id that can "
            f"be reached, digits-sd3 or digits-sd15 ({reason})"
        ) from error
    return pipe.to(device)


def _rows(recipe: FewStepRecipe) -> list[dict[str, float]]:
    scores = recipe.provenance.scores or {}
    rows = []
    for grid in recipe.grids:
        error = scores[f"mse_{grid.num_steps}_calls"]
        plain = scores[f"mse_{grid.num_steps}_calls_plain"]
        ratio = error / plain if plain > 0.0 else 1.0
        rows.append({"calls": grid.num_steps, "error": error, "plain_error": plain, "ratio": ratio})
    return rows


def _plot(recipe_file: Path, recipe: FewStepRecipe) -> str | None:
    """Beside the recipe; None where matplotlib is not installed: the recipe is what counts."""
    from fewstep.solvers.plot import save_grid_plot

    file = recipe_file.with_suffix(".png")
    try:
        save_grid_plot(file, recipe)
    except ModuleNotFoundError:
        return None
    return str(file)
