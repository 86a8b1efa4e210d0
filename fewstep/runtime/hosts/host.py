"""What a family's host does around the step loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fewstep.errors import RuntimeSettingError
from fewstep.recipe import FewStepRecipe
from fewstep.runtime.manifest import Manifest
from fewstep.runtime.session import Session
from fewstep.runtime.tokens import PromptTokenizer

Condition = dict[str, np.ndarray]
"""Inputs of the denoiser that come from the prompt, by name, one row per prompt."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a host works with: loaded on demand, so that what is not asked for costs nothing.

    Attributes:
        session: Component name -> its session.
        tokenizer: Folder name -> its tokenizer.
    """

    session: Callable[[str], Session]
    tokenizer: Callable[[str], PromptTokenizer]


@dataclass(frozen=True, slots=True)
class Size:
    """A picture's height and width in pixels; of a clip also how many pictures it has."""

    height: int
    width: int
    frames: int | None = None


class Host(ABC):
    """One family.

    Args:
        manifest: Of the folder.
        recipe: How it is sampled.
        parts: Sessions and tokenizers.
    """

    family: ClassVar[str]
    denoiser: ClassVar[str] = "transformer"
    denoiser_output: ClassVar[str] = "out_hidden_states"
    no_negative: ClassVar[str] = ""
    """What guidance is away from where no negative prompt is given."""

    def __init__(self, manifest: Manifest, recipe: FewStepRecipe, parts: Parts) -> None:
        self.manifest, self.recipe, self.parts = manifest, recipe, parts
        self.factor = int(manifest.settings["vae_scale_factor"])
        self.channels = int(manifest.settings["latent_channels"])

    @abstractmethod
    def encode(self, prompts: list[str]) -> Condition:
        """Conditions of prompts."""

    @abstractmethod
    def feeds(
        self, sample: np.ndarray, timestep: float, condition: Condition, size: Size
    ) -> dict[str, np.ndarray]:
        """Inputs of the denoiser.

        Args:
            sample: Latents, shape (B, C, h, w), float32.
            timestep: Of the schedule, 0 to 1000.
            condition: One row per picture.
            size: Of the finished pictures.
        """

    def answer(self, output: np.ndarray, size: Size) -> np.ndarray:
        """The denoiser's output as latents-shaped prediction; the same unless a family packs."""
        del size
        return output

    def guide(self, without: np.ndarray, with_prompt: np.ndarray, scale: float) -> np.ndarray:
        """Both sides of guidance as one prediction, shapes as `answer` gives them."""
        return without + np.float32(scale) * (with_prompt - without)

    def unconditional(self, negative: list[str]) -> Condition:
        """Conditions of the other side of guidance."""
        return self.encode(negative)

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Graphs of the denoiser: one, or one per expert in the recipe's order."""
        return self.manifest.experts or (self.denoiser,)

    def shift(self, size: Size, steps: int | None) -> float | None:
        """The size-dependent shift of recipes that have one; `steps` None is their default."""
        rule = self.recipe.resolution_shift
        if rule is None:
            return None
        patch = int(self.manifest.settings.get("patch_size", 1))
        tokens = (size.height // self.factor // patch) * (size.width // self.factor // patch)
        return rule.mu(tokens, steps or self.recipe.default_steps)

    @property
    def default_size(self) -> Size:
        """What the network was trained at."""
        side = int(self.manifest.settings["sample_size"]) * self.factor
        return Size(side, side)

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be divisible by this."""
        graph = self.manifest.graphs[self.denoiser]
        in_latents = max((graph.multiples.get(name, 1) for name in ("height", "width")), default=1)
        return self.factor * in_latents

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, h, w) of one picture; a clip has a further axis behind the channels."""
        return (self.channels, size.height // self.factor, size.width // self.factor)

    def check_size(self, size: Size) -> None:
        """Refuse a size the network cannot make.

        Raises:
            RuntimeSettingError: Not divisible, not positive or too large; the message names what
                can be made. Or frames are asked of a model that makes pictures.
        """
        if size.frames is not None:
            raise RuntimeSettingError(
                f"frames is {size.frames}, and this model makes single pictures; leave frames out"
            )
        step = self.size_multiple
        if min(size.height, size.width) < step or size.height % step + size.width % step:
            near = [max(step, round(side / step) * step) for side in (size.height, size.width)]
            raise RuntimeSettingError(
                f"size {size.height}x{size.width} cannot be made, both sides must be multiples of "
                f"{step}; the nearest is {near[0]}x{near[1]}"
            )
        check_largest_side(self.manifest, size)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures of latents: float32, shape (B, 3, H, W), about -1 to 1.

        Clips have a further axis, (B, 3, F, H, W).
        """
        settings = self.manifest.settings
        session = self.parts.session("vae_decoder")
        scaled = latents / np.float32(settings["scaling_factor"])
        if settings["shift_factor"]:
            scaled = scaled + np.float32(settings["shift_factor"])
        found = session.run({"latent_sample": cast(scaled, session, "latent_sample")})
        return found["sample"].astype(np.float32, copy=False)

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Pictures to look at meanwhile, shape (B, 3, H, W): of a clip its first alone."""
        return self.decode(latents)

    def encode_image(self, image: np.ndarray, draw: Callable[..., np.ndarray]) -> np.ndarray:
        """Latents of a picture.

        Args:
            image: Shape (B, 3, H, W), float32, -1 to 1.
            draw: Standard normals of a shape; asked where the autoencoder gives a distribution.
        """
        settings = self.manifest.settings
        session = self.parts.session("vae_encoder")
        found = session.run({"sample": cast(image, session, "sample")})["latent_parameters"]
        found = found.astype(np.float32, copy=False)
        if found.shape[1] == 2 * self.channels:
            mean, logvar = np.split(found, 2, axis=1)
            deviation = np.exp(np.float32(0.5) * np.clip(logvar, -30.0, 20.0))
            found = mean + deviation * draw(mean.shape[1:])
        shift, scale = settings["shift_factor"], settings["scaling_factor"]
        return (found - np.float32(shift)) * np.float32(scale)


def check_largest_side(manifest: Manifest, size: Size) -> None:
    """Refuse a size beyond a network's table of places; one that computes them has no largest.

    Raises:
        RuntimeSettingError: A side is too large.
    """
    largest = manifest.settings.get("largest_side")
    if largest is not None and max(size.height, size.width) > largest:
        raise RuntimeSettingError(
            f"size {size.height}x{size.width} cannot be made, this model has places for at most "
            f"{int(largest)} pixels a side; draw smaller, and enlarge afterwards"
        )


def cast(value: np.ndarray, session: Session, name: str) -> np.ndarray:
    """A value in the element type an input has."""
    dtype = next(tensor.dtype for tensor in session.graph.inputs if tensor.name == name)
    typed = value.astype(dtype)  # a method, so that what records a graph can follow
    # not ascontiguousarray, which makes a scalar a vector
    return np.asarray(typed, order="C") if isinstance(typed, np.ndarray) else typed


def per_picture(row: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """A row (1, ...) repeated for every picture of a batch."""
    if not isinstance(sample, np.ndarray):  # what records a graph knows its own way
        return sample.per_picture(row)
    return np.broadcast_to(row, (sample.shape[0], *row.shape[1:]))


def zeros_beside(states: np.ndarray, length: int) -> np.ndarray:
    """Zeros of `length` tokens beside token states (B, L, D): shape (B, length, D)."""
    row = np.zeros((1, length, states.shape[-1]), np.float32)
    return per_picture(row, states).astype(states.dtype)
