"""A wrapped pipeline in words: what it will do, before it does it."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline

from fewstep.pipeline.attached_adapter import AttachedAdapter
from fewstep.pipeline.guidance import call_parameters, rule_of, translate_guidance
from fewstep.recipe import Expert, FewStepRecipe, Sampler


def describe_sampling(
    stock: type[DiffusionPipeline],
    recipe: FewStepRecipe,
    source: str,
    num_steps: int,
    adapters: Sequence[AttachedAdapter],
) -> str:
    """Several lines of text.

    Args:
        stock: The stock pipeline class.
        recipe: The recipe in force.
        source: Where it came from.
        num_steps: Step count of a call that names none.
        adapters: What is attached, in the order of the recipe's experts.
    """
    guidance_arguments = translate_guidance(stock, recipe.guidance)
    _, is_guidance_known = rule_of(stock.__name__, call_parameters(stock))
    grid, base = recipe.grid(num_steps), recipe.base
    negative = recipe.guidance.negative_prompt
    counts = ", ".join(str(g.num_steps) for g in recipe.grids)
    counts += " or any" if recipe.steps == "any" else ""
    arguments = ", ".join(f"{name}={value:g}" for name, value in guidance_arguments.items())
    lines = [
        f"{stock.__name__}, sampled by a {base.family} recipe ({base.prediction} prediction)",
        f"recipe    from {source}",
        *(f"adapter   {_adapter(recipe, adapter)}" for adapter in adapters),
        *([] if adapters else ["adapter   none"]),
        f"steps     {grid.num_steps} (made for {counts})",
        f"calls     {recipe.nfe(num_steps)} network evaluations per image",
        f"guidance  {recipe.guidance.mode}: {arguments or 'no argument needed'}"
        + ("" if is_guidance_known else " (guessed from the signature)"),
        f"negative  a negative prompt {'works' if negative == 'works' else 'has no effect'}",
        f"sampler   {_sampler(recipe.sampler)}",
        f"noise     {recipe.sampler.noise}: float32, one CPU stream per image",
        f"step  timestep     sigma{'  expert' if grid.experts else ''}",
    ]
    for index, (timestep, sigma) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False)):
        expert = f"  {_expert(recipe.experts[grid.experts[index]])}" if grid.experts else ""
        lines.append(f"{index + 1:>4}  {timestep:>8.2f}  {sigma:>8.5f}{expert}")
    lines.append(f" end            {grid.sigmas[-1]:>10.5f}")
    return "\n".join(lines)


def _adapter(recipe: FewStepRecipe, adapter: AttachedAdapter) -> str:
    fused = ", fused" if adapter.is_fused else ""
    text = f"{adapter.path.name} at scale {adapter.scale:g}{fused}"
    if adapter.expert is None:
        return text
    if recipe.routes:
        return f"{text} for prompts near {recipe.routes[adapter.expert].adapter}"
    return f"{text} for {_expert(recipe.experts[adapter.expert])}"


def _expert(expert: Expert) -> str:
    return expert.adapter + (f" on {expert.component}" if expert.component else "")


def _sampler(sampler: Sampler) -> str:
    stochasticity = sampler.stochasticity
    if sampler.kind == "flow_map":
        return "flow map (the network is told where each step ends), deterministic"
    if sampler.policy is not None:
        return (
            f"policy ({sampler.policy.kind}, {sampler.policy.components} components): each call "
            f"tells the velocity of a whole step, {sampler.policy.substeps} substeps in all"
        )
    if stochasticity == 0.0:
        return "deterministic (Euler / DDIM)"
    kind = "re-noising (LCM, DMD2)" if stochasticity == 1.0 else "partly re-noising (TCD)"
    return f"{kind}, stochasticity {stochasticity:g}: draws fresh noise after all but the last step"
