"""What a stock pipeline is called with: the recipe's numbers filled in, conflicts said aloud."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fewstep.errors import PipelineError
from fewstep.noise import image_seeds
from fewstep.pipeline.guidance import GuidanceRule, call_parameters, rule_of, translate_guidance
from fewstep.recipe import FewStepRecipe

OWN_GRIDS = ("timesteps", "sigmas")
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")
PROMPTS = ("prompt", "prompt_embeds", "image")
USER = 5
"""Stack depth of whoever called the pipeline, for warnings."""


def fill_arguments(
    pipeline_class: type,
    given: Mapping[str, Any],
    recipe: FewStepRecipe,
    *,
    num_steps: int,
    seed: int | Sequence[int] | None,
) -> dict[str, Any]:
    """The arguments a stock pipeline is really called with.

    Args:
        pipeline_class: The stock class.
        given: What the caller passed, by name.
        recipe: The recipe in force.
        num_steps: Step count where the caller names none.
        seed: First image's seed, or one seed per image.

    Returns:
        `given` with steps, guidance, text length and per-image generators filled in.

    Raises:
        RecipeError: The model was not made for the step count asked for.
        PipelineError: A grid of the caller's own, or seed and generator together.
    """
    parameters = call_parameters(pipeline_class)
    arguments = dict(given)
    refuse_own_grid(arguments)
    count = arguments.get("num_inference_steps")
    arguments["num_inference_steps"] = recipe.grid(num_steps if count is None else count).num_steps
    _fill_guidance(pipeline_class, parameters, arguments, recipe)
    length = recipe.base.max_sequence_length
    if length is not None and "max_sequence_length" in parameters:
        arguments.setdefault("max_sequence_length", length)
    if "original_inference_steps" in parameters:  # else it is read from a config ours lacks
        arguments["original_inference_steps"] = arguments["num_inference_steps"]
    if "intermediate_timesteps" in parameters:  # SANA-Sprint refuses its own default
        arguments["intermediate_timesteps"] = None
    _fill_first_noise(parameters, arguments, recipe)
    if not _is_guided(rule_of(pipeline_class.__name__, parameters)[0], arguments):
        _fill_negative_image(parameters, arguments)
    if arguments.get("eta"):
        warnings.warn(
            f"eta={arguments['eta']:g} has no effect: the recipe's stochasticity is "
            f"{recipe.sampler.stochasticity:g}",
            stacklevel=USER,
        )
    if seed is not None:
        arguments["generator"] = seeded_generators(arguments, seed)
    return arguments


def has_inert_negative_prompt(
    pipeline_class: type, arguments: Mapping[str, Any], recipe: FewStepRecipe
) -> bool:
    """Whether filled arguments hold a negative prompt that cannot change the picture."""
    if recipe.guidance.negative_prompt == "works":
        return False
    rule, _ = rule_of(pipeline_class.__name__, call_parameters(pipeline_class))
    if recipe.guidance.mode in ("none", "embedded") and _is_guided(rule, arguments):
        return False  # the caller turned guidance on, and was warned of that
    for name, value in arguments.items():
        if name.startswith("negative_prompt") and not name.endswith("mask") and value is not None:
            texts = value if isinstance(value, list) else [value]
            if any(not isinstance(text, str) or text.strip() for text in texts):
                return True
    return False


def count_images(arguments: Mapping[str, Any]) -> int:
    """How many images (or videos) a call makes."""
    batch = 1
    for name in PROMPTS:
        value = arguments.get(name)
        if isinstance(value, list | tuple | torch.Tensor):
            batch = len(value)
        if value is not None:
            break
    for name in PER_PROMPT:
        batch *= arguments.get(name) or 1
    return batch


def seeded_generators(
    arguments: Mapping[str, Any], seed: int | Sequence[int]
) -> list[torch.Generator]:
    """One CPU generator per image of a call.

    Raises:
        PipelineError: Beside a generator of the caller's own, or not one seed per image.
        ConfigError: A seed is no whole number from 0 to 2**64 - 1.
    """
    if arguments.get("generator") is not None:
        raise PipelineError("seed and generator were both passed; pass one of them")
    count = count_images(arguments)
    if isinstance(seed, Sequence):  # each is checked as a seed of its own
        seeds = tuple(image_seeds(one, 1)[0] for one in seed)
    else:
        seeds = image_seeds(seed, count)
    if len(seeds) != count:
        raise PipelineError(f"got {len(seeds)} seeds for {count} images; pass one per image")
    return [torch.Generator().manual_seed(int(s)) for s in seeds]


def refuse_own_grid(arguments: Mapping[str, Any]) -> None:
    """Refuse timesteps or sigmas beside a recipe.

    Raises:
        PipelineError: Either was passed.
    """
    for name in OWN_GRIDS:
        if arguments.get(name) is not None:
            raise PipelineError(
                f"{name} was passed, but the recipe owns the grid; "
                f"drop {name}, or unwrap() the pipeline to sample it freely"
            )


def _fill_guidance(
    pipeline_class: type,
    parameters: set[str],
    arguments: dict[str, Any],
    recipe: FewStepRecipe,
) -> None:
    rule, _ = rule_of(pipeline_class.__name__, parameters)
    for name, wanted in translate_guidance(pipeline_class, recipe.guidance).items():
        user = arguments.get(name)
        both_off = user is not None and rule.is_off(name, user) and rule.is_off(name, wanted)
        if user is None or both_off:
            arguments[name] = wanted
        elif user != wanted:
            warnings.warn(
                f"{name}={user:g} is used as passed, but this model was made for "
                f"{name}={wanted:g} (guidance {recipe.guidance.mode!r}); expect other pictures",
                stacklevel=USER + 1,
            )
    if recipe.sampler.kind == "policy" and _is_guided(rule, arguments):
        raise PipelineError(
            f"{rule.cfg}={arguments[str(rule.cfg)]:g} mixes two answers of the network, but this "
            "recipe's network answers with a policy, which cannot be mixed; leave it out"
        )
    if _is_guided(rule, arguments) and rule.needs_negative and "negative_prompt" in parameters:
        _fill_negative_prompt(arguments)


def _fill_first_noise(
    parameters: set[str], arguments: dict[str, Any], recipe: FewStepRecipe
) -> None:
    """Latents for a grid that begins below full noise are noised to where it begins (LTX)."""
    if arguments.get("latents") is None:
        return
    grid = recipe.grid(arguments["num_inference_steps"])
    if grid.sizes and grid.sizes[0] != 1.0:
        raise PipelineError(
            "latents were passed, but this recipe's first sample is smaller than the picture; "
            "drop latents and pass seed"
        )
    first = grid.sigmas[0]
    if first < 1.0:
        for name in {"noise_scale", "denoise_strength"} & parameters:
            arguments.setdefault(name, first)


def _fill_negative_image(parameters: set[str], arguments: dict[str, Any]) -> None:
    """FLUX encodes a black picture beside IP-Adapter embeddings, which only guidance looks at.

    Without an image encoder, which embeddings make superfluous, that would fail.
    """
    given = arguments.get("ip_adapter_image_embeds")
    if given is None or "negative_ip_adapter_image_embeds" not in parameters:
        return
    if arguments.get("negative_ip_adapter_image") is None:
        embeds = given if isinstance(given, list) else [given]
        blank = [torch.zeros_like(one) for one in embeds]
        arguments.setdefault("negative_ip_adapter_image_embeds", blank)


def _is_guided(rule: GuidanceRule, arguments: Mapping[str, Any]) -> bool:
    return rule.cfg is not None and (arguments.get(rule.cfg) or 0.0) > rule.off


def _fill_negative_prompt(arguments: dict[str, Any]) -> None:
    """FLUX and Qwen-Image guide only beside a negative prompt, and are silent without one."""
    if arguments.get("negative_prompt") is None and arguments.get("negative_prompt_embeds") is None:
        if arguments.get("prompt_embeds") is not None:
            raise PipelineError(
                "this recipe guides, which needs an unconditional pass; "
                "pass negative_prompt_embeds beside prompt_embeds"
            )
        arguments["negative_prompt"] = " "
