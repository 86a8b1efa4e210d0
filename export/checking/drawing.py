"""A picture as the gate draws it: with every network's inputs and every step's clean latents."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from fewstep.export.checking.recording import RecordingLoader
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime, StepEvent
from fewstep.runtime.hosts.host import Host, Parts, Size
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.session import Feeds, Loader

CLIP = 9
"""Pictures of a clip that is compared: three latent frames where four pictures are one."""
MOST = 4
"""Prompts that are drawn together: memory grows with each."""
LONG = "a picture of many small things on a table, described one after the other at great length, "


@dataclass(frozen=True, slots=True)
class Case:
    """Pictures that are drawn together.

    Attributes:
        name: For people.
        prompts: One per picture.
        size: (height, width) in pixels.
        seed: Of the first picture.
        frames: Pictures of each clip; None where they are no clips.
    """

    name: str
    prompts: tuple[str, ...]
    size: tuple[int, int]
    seed: int = 0
    frames: int | None = None


@dataclass(frozen=True, slots=True)
class Drawing:
    """What was seen while a case was drawn.

    Attributes:
        feeds: Component -> inputs of its calls, in order.
        steps: Predicted clean latents after each step, shape (B, C, h, w); the last are decoded.
        pixels: uint8, shape (B, H, W, 3). Latents and pixels of clips have one axis more.
    """

    feeds: dict[str, list[Feeds]]
    steps: tuple[np.ndarray, ...]
    pixels: np.ndarray

    def feeds_of(self, name: str) -> list[Feeds]:
        """Inputs of a component's calls; the encoder, which no drawing calls, takes its pictures.

        Args:
            name: Of a component.

        Returns:
            Empty where there is nothing to give it.
        """
        if name != "vae_encoder":
            return self.feeds.get(name, [])
        pixels = self.pixels.astype(np.float32).transpose(0, 3, 1, 2)
        return [{"sample": pixels / np.float32(127.5) - np.float32(1.0)}]


def cases_of(folder: ExportFolder, prompts: Sequence[str]) -> tuple[Case, ...]:
    """One picture alone, two of an odd aspect, one with a prompt that is too long, then several.

    Clips are drawn small and short, without the last: their own size takes a processor hours.

    Args:
        folder: Whose sizes.
        prompts: At least one; the first `MOST` are drawn together.
    """
    host = _host(folder)
    side, step = host.default_size, host.size_multiple
    if side.frames is not None:
        side = _small(side, step)
    narrow = max(step, side.width * 3 // 4 // step * step)
    native, frames = (side.height, side.width), side.frames
    first, second = prompts[0], prompts[1 % len(prompts)]
    found = [
        Case("one picture" if frames is None else "one clip", (first,), native, frames=frames),
        Case("odd aspect", (first, second), (side.height, narrow), seed=1, frames=frames),
        Case("longest prompt", (LONG * 40,), native, seed=2, frames=frames),
    ]
    if len(prompts) > 1 and frames is None:
        several = tuple(prompts[:MOST])
        found.append(Case(f"{len(several)} prompts", several, native, seed=3))
    return tuple(found)


def draw(folder: ExportFolder, loader: Loader, case: Case) -> Drawing:
    """Draw one case and keep what was seen."""
    recorder = RecordingLoader(loader)
    steps: list[np.ndarray] = []

    def keep(event: StepEvent) -> None:
        steps.append(np.array(event.x0))

    runtime = FewStepRuntime(folder, recorder, host_of(folder.manifest.family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prompts are cut for every engine alike
        found = runtime(
            case.prompts, seed=case.seed, size=case.size, frames=case.frames, callback=keep
        )
    graphs = folder.manifest.graphs
    feeds = {n: recorder.kept[g.file] for n, g in graphs.items() if g.file in recorder.kept}
    return Drawing(feeds, tuple(steps), found.pixels)


def drawer(
    folder: ExportFolder, loader: Loader, case: Case, steps: int | None = None
) -> Callable[[int], object]:
    """What draws a case anew, with other texts each time, to be timed.

    Args:
        folder: Whose recipe and hosts.
        loader: Runs its graphs.
        case: What is drawn.
        steps: Step count; None takes the recipe's.
    """
    runtime = FewStepRuntime(folder, loader, host_of(folder.manifest.family))

    def once(index: int) -> object:
        it = another(case, index)
        return runtime(it.prompts, seed=it.seed, size=it.size, frames=it.frames, steps=steps)

    return once


def another(case: Case, index: int) -> Case:
    """The same work with another text: a prompt that was seen before is not encoded again."""
    prompts = tuple(f"{prompt} {index}" for prompt in case.prompts)
    return replace(case, prompts=prompts, seed=case.seed + index)


def _small(size: Size, step: int) -> Size:
    """A quarter of each side, and as many pictures as a decoder needs to remember some."""
    height, width = (max(step, side // 4 // step * step) for side in (size.height, size.width))
    return Size(height, width, CLIP)


def _host(folder: ExportFolder) -> Host:
    """The family's host where only its sizes are asked for: nothing is loaded."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not needed to know a size")

    kind = host_of(folder.manifest.family)
    return kind(folder.manifest, folder.recipe, Parts(refuse, refuse))
