"""Everything known of a LoRA, a recipe and a MODEL, as text."""

from pathlib import Path
from typing import Any

from fewstep.comfy_nodes.base_check import base_problem
from fewstep.comfy_nodes.model_levels import comfy_sigmas
from fewstep.comfy_nodes.model_recipe import resolve
from fewstep.comfy_nodes.recipe_text import details, summary, table
from fewstep.comfy_nodes.sockets import NamedRecipe
from fewstep.errors import AdapterError, RecipeError, RecipeNotFoundError


def report(file: Path | None, given: NamedRecipe | None, model: Any) -> str:
    """What there is to say; the recipe told is the given one, else the file's, else the MODEL's.

    Args:
        file: A LoRA, of which the header is read.
        given: A recipe.
        model: A MODEL; sigmas are also told in its numbers, and whether it is the recipe's base.

    Raises:
        RecipeNotFoundError: There is nothing to tell.
        AdapterError: The file is damaged.
        RecipeError: It carries a recipe that is not valid.
    """
    from fewstep.comfy_nodes.lora_facts import lora_facts  # not when ComfyUI starts

    facts = None if file is None else lora_facts(file)
    if given is None and facts is not None and facts.recipe is not None:
        given = NamedRecipe(facts.recipe, facts.name)
    if given is None and facts is None:
        if model is None:
            raise RecipeNotFoundError(
                "There is nothing to show; choose a LoRA, or connect a recipe."
            )
        given = resolve(model, None)
    parts = []
    if given is not None:
        parts += [summary(given.recipe, given.name), "", _recipe_table(given, model)]
    if facts is not None:
        parts += ["", table(facts.rows)]
    return "\n".join(parts).strip()


def _recipe_table(named: NamedRecipe, model: Any) -> str:
    if model is None:
        return details(named.recipe, named.name)
    problem, sigmas = base_problem(named.recipe, model), None
    try:
        sigmas = comfy_sigmas(named.recipe, model.get_model_object("model_sampling")).tolist()
    except (AdapterError, RecipeError) as error:
        problem = problem or str(error)
    text = details(named.recipe, named.name, model_sigmas=sigmas)
    return text if problem is None else f"{text}\n{table([('warning', problem)])}"
