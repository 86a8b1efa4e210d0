"""Presets: the entries of the zoo that ComfyUI can sample, as a list to choose from. No ComfyUI.

A choice is "SDXL · dmd2-sdxl-4step-lora": the family for people, then the entry's own name, which
never changes and is what a workflow is read by. An entry of two stages (LTX) is two choices,
"... stage 1" and "... stage 2", since a sampler of ComfyUI makes one stage. The list itself is kept
in `preset_list`, because ComfyUI asks for it when it starts and the zoo takes a while to read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.comfy_nodes.preset_list import PRESETS
from fewstep.comfy_nodes.recipe_limits import FAMILIES, beyond_comfyui, family_title
from fewstep.errors import RecipeError
from fewstep.recipe import FewStepRecipe

if TYPE_CHECKING:  # the zoo is imported when it is asked: ComfyUI should start without it
    from fewstep.zoo import ZooEntry

CUSTOM = "custom"
"""The choice of writing a recipe."""
CHOICES = [CUSTOM, *PRESETS]
"""What the list of the node shows."""
SEPARATOR, STAGE = " · ", " stage "
KINDS = ("lora", "checkpoint", "denoiser")
"""Files that core ComfyUI loads; motion modules, weight differences and policies it does not."""


@dataclass(frozen=True, slots=True)
class Preset:
    """One choice.

    Attributes:
        entry: Of the zoo.
        recipe: Its recipe, or of one of its two stages.
        stage: 1 or 2; 0 where there is one stage.
    """

    entry: "ZooEntry"
    recipe: FewStepRecipe
    stage: int = 0

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.entry.title}, stage {self.stage}" if self.stage else self.entry.title

    @property
    def label(self) -> str:
        """As the list shows it."""
        stage = f"{STAGE}{self.stage}" if self.stage else ""
        return f"{family_title(self.entry.family)}{SEPARATOR}{self.entry.name}{stage}"


def find_preset(choice: str) -> Preset:
    """What a choice stands for: of this release's list, of an older one's, or an entry's name.

    Raises:
        RecipeError: There is no such entry (the message names similar ones), or it is no preset.
    """
    from fewstep.zoo import entry

    name, _, stage = choice.rpartition(SEPARATOR)[2].partition(STAGE)
    found = entry(name)
    if reason := why_not(found):
        raise RecipeError(
            f"{found.title} is no preset: {reason}; see {found.sources[0]} and choose "
            f'"{CUSTOM}" to write its recipe'
        )
    stages = list(_stages(found))
    for each in stages:
        if stage in ("", str(each.stage)):
            return each
    raise RecipeError(f"{found.title} has no stage {stage}; choose {stages[0].label!r}")


def why_not(found: "ZooEntry") -> str | None:
    """Why an entry is no preset, as the end of a sentence; None if it is one."""
    from fewstep.zoo.entry import VERIFICATION_TEXT

    if found.unsupported is not None:
        return found.unsupported
    if found.family not in FAMILIES:
        return f"this pack knows no {found.family} model of ComfyUI"
    if found.kind not in KINDS:
        return f"core ComfyUI does not load {found.kind.replace('_', ' ')} files"
    if not found.is_verified:
        how = VERIFICATION_TEXT[found.verification]
        return f"its numbers are {how}, and a preset needs the authors' word"
    return beyond_comfyui(next(_stages(found)).recipe)


def find_presets() -> list[Preset]:
    """Every preset of the zoo, by family and title; reads the whole zoo."""
    from fewstep.zoo import entries

    found = sorted((each for each in entries() if why_not(each) is None), key=_order)
    return [each for one in found for each in _stages(one)]


def _order(found: "ZooEntry") -> tuple[str, list[str | int]]:
    """Family, then title, where 2 steps come before 12."""
    words = re.split(r"(\d+)", found.title.lower())
    return family_title(found.family).lower(), [int(w) if w.isdigit() else w for w in words]


def _stages(found: "ZooEntry") -> Iterator[Preset]:
    recipe = found.required_recipe()
    if recipe.second_stage is None:
        yield Preset(found, recipe)
        return
    yield Preset(found, replace(recipe, second_stage=None), 1)
    yield Preset(found, recipe.for_second_stage(), 2)


def list_module() -> str:
    """The text of `preset_list`."""
    lines = "".join(f'    "{each.label}",\n' for each in find_presets())
    return (
        '"""The choices of the node "Few-Step Recipe"; written by '
        "`python -m fewstep.comfy_nodes.presets`.\n\nA test compares them with the zoo.\n"
        f'"""\n\nPRESETS = (\n{lines})\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("preset_list.py").write_text(list_module(), encoding="utf-8")
