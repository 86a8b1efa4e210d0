"""An adapter file as the loader node sees it, before any MODEL is looked at. Needs no ComfyUI.

The recipe is the file's own, else that of the zoo entry the file is known as.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.adapters import AdapterHeader, adapter_parts, open_adapter
from fewstep.adapters.conversion.checkpoints import is_full_checkpoint
from fewstep.adapters.expert_tags import components_of, expert_by_name, expert_tag
from fewstep.adapters.kinds import TWO_NETWORKS
from fewstep.errors import AdapterError, RecipeError, RecipeNotFoundError, RecipeVersionError
from fewstep.recipe import FORMAT_MAJOR, METADATA_KEY, FewStepRecipe
from fewstep.zoo import ZooMatch, match_adapter
from fewstep.zoo.entry import UNVERIFIED, VERIFICATION_TEXT


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An adapter that ComfyUI can apply, and how it wants to be sampled.

    Attributes:
        header: The file's.
        recipe: How to sample it.
        title: For people: the title in its metadata, of the zoo, or its file name.
        note: What the user should know of where the recipe comes from; "" where it is the file's.
        expert: The phase that the zoo says it serves; None where it says none.
    """

    header: AdapterHeader
    recipe: FewStepRecipe
    title: str
    note: str = ""
    expert: str | None = None

    @property
    def name(self) -> str:
        """Its file name, for messages."""
        return self.header.path.name


def fingerprint(path: Path) -> str:
    """What changes when the file does; cheap, as ComfyUI asks for it before every run."""
    stat = path.stat()
    return f"{path.name}:{stat.st_mtime_ns}:{stat.st_size}"


def open_lora(path: Path) -> LoraFile:
    """Read a file's header and find its recipe.

    Raises:
        AdapterError: The file is damaged, no LoRA, or of a kind that ComfyUI cannot apply.
        RecipeError: Its recipe is not valid.
        RecipeNotFoundError: It has none, and the zoo does not know the file.
    """
    header = open_adapter(path)
    _check_kind(header)
    recipe = _own_recipe(header)
    title = header.metadata.get("modelspec.title", "").strip() or path.stem
    if recipe is not None:
        return LoraFile(header, recipe, title)
    match = match_adapter(header)
    if match is None:
        raise RecipeNotFoundError(
            f"{path.name!r} has no few-step recipe. Use a fewstep export, or load it with the core "
            'LoRA loader and connect a "Few-Step Recipe" node (a preset may exist).'
        )
    if match.entry.recipe is None:
        raise RecipeNotFoundError(
            f"{path.name!r} is {match.entry.title}, which these nodes do not sample: "
            f"{match.entry.unsupported or match.entry.notes}"
        )
    note = _zoo_note(match)
    return LoraFile(header, match.entry.recipe, match.entry.title, note, match.file.expert)


def phases_in(file: LoraFile, chosen: int | None = None) -> tuple[int, ...]:
    """Indices of the recipe's experts that a file has weights for; () for a recipe without.

    Args:
        file: The file.
        chosen: Index of the expert the user says it is; None asks the file: its metadata, the
            network its modules name, its name.

    Raises:
        AdapterError: There is no such expert, nothing tells which one it is, or the file is for
            two networks.
    """
    experts = file.recipe.experts
    if not experts:
        return ()
    names = [expert.adapter for expert in experts]
    if chosen is not None:
        if chosen >= len(names):
            raise AdapterError(
                f"expert is {chosen + 1}, but the recipe of {file.name!r} has {len(names)}: "
                f"{_listed(names)}."
            )
        return (chosen,)
    components = [expert.component for expert in experts]
    named = components_of(file.header)
    if set(TWO_NETWORKS) <= set(named):
        if set(components) == {None} and len(names) == 2:
            return (0, 1)
        raise AdapterError(
            f"{file.name!r} holds weights for two networks. Choose in expert which one this MODEL "
            f"is: {_listed(names)}."
        )
    found = _told_by_file(file, names)
    if found is None:
        raise AdapterError(
            f"Nothing says which phase {file.name!r} is for. Choose it in expert: {_listed(names)}."
        )
    return (found,)


def component_for(file: LoraFile, phase: int | None) -> str:
    """The pipeline component a phase's tensors are named for, where a file names two.

    Args:
        file: The file.
        phase: Index of the expert; None without experts.
    """
    own = None if phase is None else file.recipe.experts[phase].component
    if phase is not None and set(TWO_NETWORKS) <= set(components_of(file.header)):
        return own or TWO_NETWORKS[phase]
    return own or TWO_NETWORKS[0]


def _check_kind(header: AdapterHeader) -> None:
    parts = adapter_parts(header)
    if parts.kind != "lora":
        advice = "sample it with FewStepPipeline"
        if parts.kind == "lorad":
            advice = 'make a LoRA of it with "fewstep convert --format comfyui --base ... --rank"'
        raise AdapterError(
            f"{header.path.name!r} is {parts.kind_text}, which ComfyUI cannot apply; {advice}."
        )
    if is_full_checkpoint(header):
        raise AdapterError(
            f"{header.path.name!r} is a whole model, not a LoRA. Load it as a diffusion model and "
            'connect a "Few-Step Recipe" node.'
        )


def _own_recipe(header: AdapterHeader) -> FewStepRecipe | None:
    try:
        return header.recipe()
    except RecipeVersionError as error:
        raise RecipeVersionError(
            f"Recipe needs ComfyUI nodes format {_format_of(header)}, this pack reads "
            f"{FORMAT_MAJOR}. Update the Few-Step pack."
        ) from error
    except RecipeError as error:
        raise RecipeError(f"The recipe in {header.path.name!r} is not valid ({error}).") from error


def _format_of(header: AdapterHeader) -> str:
    text = str(json.loads(header.metadata[METADATA_KEY])["format"])
    return re.sub(r".*/", "", text)


def _zoo_note(match: ZooMatch) -> str:
    found = match.entry
    note = f"The file has no recipe; the zoo's for {found.title} is used."
    if match.how == "file name":
        note = f"The file has no recipe; by its name alone, the zoo's for {found.title} is used."
    if found.verification in UNVERIFIED:
        note += f" Its numbers were {VERIFICATION_TEXT[found.verification]}."
    return note


def _told_by_file(file: LoraFile, names: Sequence[str]) -> int | None:
    if file.expert in names:
        return names.index(file.expert)
    tag = expert_tag(file.header)  # here, what its modules say goes before its name
    if tag is not None and tag.name in names:
        return names.index(tag.name)
    return expert_by_name(file.header, names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{index} {name}" for index, name in enumerate(names, start=1))
