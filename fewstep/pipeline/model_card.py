"""The README.md of a saved pipeline: what it is, and how to sample it with and without fewstep."""

import diffusers

from fewstep.pipeline.guidance import translate_guidance
from fewstep.pipeline.stock_scheduler import StockScheduler
from fewstep.recipe import FewStepRecipe

CARD_MARK = "<!-- written by fewstep; delete this line to keep your own text -->"


def model_card(
    title: str, class_name: str, recipe: FewStepRecipe, num_steps: int, stand_in: StockScheduler
) -> str:
    """Markdown.

    Args:
        title: Heading.
        class_name: The stock pipeline class.
        recipe: What is described.
        num_steps: The default step count.
        stand_in: The scheduler that was saved.
    """
    return "\n".join(
        [
            *_front_matter(recipe),
            CARD_MARK,
            f"# {title}",
            "",
            f"A {recipe.base.family} model that draws in {_counts(recipe)} steps; the recipe is in "
            "`fewstep_recipe.json`.",
            "",
            *_table(recipe, num_steps),
            "",
            "## With fewstep",
            "```python",
            "from fewstep import FewStepPipeline",
            "",
            f'pipe = FewStepPipeline.from_pretrained("{title}")',
            'image = pipe(prompt="...", seed=0)[0]',
            "```",
            "",
            "## Without fewstep",
            *_without(title, class_name, recipe, num_steps, stand_in),
            "",
        ]
    )


def _front_matter(recipe: FewStepRecipe) -> list[str]:
    provenance, base = recipe.provenance, recipe.base
    lines = ["---", "library_name: diffusers", "tags:", "- fewstep", f"- {base.family}"]
    if base.model_id is not None:
        lines.append(f'base_model: "{base.model_id}"')
    if provenance.licence is not None:
        lines += ["license: other", f'license_name: "{provenance.licence}"']
    return [*lines, "---"]


def _counts(recipe: FewStepRecipe) -> str:
    counts = [str(grid.num_steps) for grid in recipe.grids]
    return ", ".join(counts) + (" or any number of" if recipe.steps == "any" else "")


def _table(recipe: FewStepRecipe, num_steps: int) -> list[str]:
    grid, sampler, guidance = recipe.grid(num_steps), recipe.sampler, recipe.guidance
    rows = ["| step | timestep | sigma |", "| --- | --- | --- |"]
    for index, (timestep, sigma) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False)):
        rows.append(f"| {index + 1} | {timestep:.2f} | {sigma:.5f} |")
    rows.append(f"| end | | {grid.sigmas[-1]:.5f} |")
    shifted = ", before the shift for the image size" if recipe.resolution_shift else ""
    return [
        f"The {grid.num_steps}-step grid{shifted}; {recipe.base.prediction} prediction, "
        f"stochasticity {sampler.stochasticity:g}, guidance {guidance.mode} {guidance.scale:g}, "
        f"{recipe.nfe(num_steps)} network evaluations.",
        "",
        *rows,
    ]


def _without(
    title: str, class_name: str, recipe: FewStepRecipe, num_steps: int, stand_in: StockScheduler
) -> list[str]:
    if stand_in.scheduler is None:
        return [
            f"Stock diffusers cannot sample this recipe: {stand_in.deviations[0]}. The scheduler "
            "in this folder is the base model's own; do not expect few-step pictures from it."
        ]
    arguments = {
        "num_inference_steps": num_steps,
        **translate_guidance(getattr(diffusers, class_name), recipe.guidance),
        **dict(stand_in.arguments),
    }
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    name = type(stand_in.scheduler).__name__
    exact = f"`{name}` draws the recipe's own steps."
    differs = f"`{name}` comes near: {'; '.join(stand_in.deviations)}."
    return [
        exact if stand_in.is_exact else differs,
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{title}")',
        f'image = pipe(prompt="...", {written})[0]',
        "```",
    ]
