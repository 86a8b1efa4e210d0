"""A wrapped pipeline in words: what it will do, before it does it."""

from collections.abc import Mapping

from fewstep.pipeline.attached_adapter import AttachedAdapter
from fewstep.recipe import FewStepRecipe


def describe_sampling(
    *,
    class_name: str,
    recipe: FewStepRecipe,
    source: str,
    num_steps: int,
    adapter: AttachedAdapter | None,
    guidance_arguments: Mapping[str, float],
    is_guidance_known: bool,
) -> str:
    """Several lines of text.

    Args:
        class_name: The stock pipeline class.
        recipe: The recipe in force.
        source: Where it came from.
        num_steps: Step count of a call that names none.
        adapter: What is attached, if anything.
        guidance_arguments: What the class is called with for the recipe's guidance.
        is_guidance_known: Whether those come from the table, not from a guess.
    """
    grid, base = recipe.grid(num_steps), recipe.base
    negative = recipe.guidance.negative_prompt
    counts = ", ".join(str(g.num_steps) for g in recipe.grids)
    counts += " or any" if recipe.steps == "any" else ""
    arguments = ", ".join(f"{name}={value:g}" for name, value in guidance_arguments.items())
    lines = [
        f"{class_name}, sampled by a {base.family} recipe ({base.prediction} prediction)",
        f"recipe    from {source}",
        f"adapter   {_adapter(adapter)}",
        f"steps     {grid.num_steps} (made for {counts})",
        f"calls     {recipe.nfe(num_steps)} network evaluations per image",
        f"guidance  {recipe.guidance.mode}: {arguments or 'no argument needed'}"
        + ("" if is_guidance_known else " (guessed from the signature)"),
        f"negative  a negative prompt {'works' if negative == 'works' else 'has no effect'}",
        f"sampler   {_sampler(recipe.sampler.stochasticity)}",
        f"noise     {recipe.sampler.noise}: float32, one CPU stream per image",
        "step  timestep     sigma",
    ]
    for index, (timestep, sigma) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False)):
        lines.append(f"{index + 1:>4}  {timestep:>8.2f}  {sigma:>8.5f}")
    lines.append(f" end            {grid.sigmas[-1]:>10.5f}")
    return "\n".join(lines)


def _adapter(adapter: AttachedAdapter | None) -> str:
    if adapter is None:
        return "none"
    return f"{adapter.path.name} at scale {adapter.scale:g}{', fused' if adapter.is_fused else ''}"


def _sampler(stochasticity: float) -> str:
    if stochasticity == 0.0:
        return "deterministic (Euler / DDIM)"
    kind = "re-noising (LCM, DMD2)" if stochasticity == 1.0 else "partly re-noising (TCD)"
    return f"{kind}, stochasticity {stochasticity:g}: draws fresh noise after all but the last step"
