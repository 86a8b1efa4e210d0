"""What is asked of the runtime, checked before anything is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fewstep.errors import RuntimeSettingError
from fewstep.noise import image_seeds
from fewstep.runtime.hosts.host import Size


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What a callback is told after each step.

    Attributes:
        index: Of the step just taken, from 0.
        num_steps: How many there are.
        x0: Predicted clean latents, shape (B, C, h, w), or (B, C, f, h, w) of clips.
        preview: Decodes them; costs as much as the last step's decoding. Of a clip its first
            picture alone.
    """

    index: int
    num_steps: int
    x0: np.ndarray
    preview: Callable[[], list[Image.Image]]


@dataclass(frozen=True, slots=True)
class Request:
    """One call.

    Attributes:
        prompts: One per picture.
        negative: One per picture, or None.
        seeds: One per picture.
        steps: None takes the recipe's.
        size: Of the pictures.
    """

    prompts: tuple[str, ...]
    negative: tuple[str, ...] | None
    seeds: tuple[int, ...]
    steps: int | None
    size: Size


def make_request(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    *,
    seed: int | Sequence[int],
    steps: int | None,
    size: Size,
    num_images: int,
) -> Request:
    """One picture per prompt and repetition, each with its seed.

    Raises:
        RuntimeSettingError: No prompt, a count below 1, or counts that do not fit each other.
        ConfigError: A seed is out of range.
    """
    prompts = _texts("prompt", prompt)
    if num_images < 1:
        raise RuntimeSettingError(f"num_images must be at least 1, got {num_images}")
    every = tuple(text for text in prompts for _ in range(num_images))
    negative = None
    if negative_prompt is not None:
        given = _texts("negative_prompt", negative_prompt)
        if len(given) not in (1, len(prompts)):
            raise RuntimeSettingError(
                f"got {len(given)} negative prompts for {len(prompts)} prompts; pass one or all"
            )
        wide = given * len(prompts) if len(given) == 1 else given
        negative = tuple(text for text in wide for _ in range(num_images))
    return Request(every, negative, _seeds(seed, len(every)), steps, size)


def _texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RuntimeSettingError(f"{name} must be a text or a list of texts, got {value!r}"[:200])
    return texts


def _seeds(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    if not isinstance(seed, Sequence):
        return image_seeds(seed, count)
    found = tuple(image_seeds(one, 1)[0] for one in seed)
    if len(found) != count:
        raise RuntimeSettingError(f"got {len(found)} seeds for {count} pictures; pass one each")
    return found
