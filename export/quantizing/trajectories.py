"""Inputs of a folder's networks along the student's own paths."""

from collections.abc import Sequence
from dataclasses import replace

from fewstep.export.checking.drawing import cases_of, draw
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.session import Feeds, Loader


def record(
    folder: ExportFolder, loader: Loader, prompts: Sequence[str], *, seed: int = 0
) -> dict[str, list[Feeds]]:
    """Draw one picture per prompt at the model's own size and keep every network's inputs.

    Clips are small and short, as the gate draws them.

    Args:
        folder: Whose recipe and hosts.
        loader: Runs its graphs.
        prompts: Texts.
        seed: Of the first picture; the next has seed + 1.

    Returns:
        Component name -> feeds in the order of the calls, one picture each.
    """
    first = cases_of(folder, prompts)[0]
    found: dict[str, list[Feeds]] = {}
    for index, prompt in enumerate(prompts):
        case = replace(first, name="calibration", prompts=(prompt,), seed=seed + index)
        seen = draw(folder, loader, case)
        for name, feeds in seen.feeds.items():
            found.setdefault(name, []).extend(feeds)
    return found
