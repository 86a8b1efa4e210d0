"""One entry of the zoo: which files it is about, who says so, and the recipe."""

import dataclasses
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fewstep import strict_json
from fewstep.errors import RecipeError
from fewstep.recipe import FewStepRecipe

Verification = Literal["authors", "card", "docs", "third_party", "memory"]
VERIFICATION_TEXT: dict[str, str] = {
    "authors": "read in the authors' own code, README or config",
    "card": "read in the model card",
    "docs": "read in diffusers' documentation or code",
    "third_party": "told by third parties only",
    "memory": "written from memory",
}
UNVERIFIED = ("third_party", "memory")
"""Marks that are told to the user when such a recipe is used."""
_HEX_64 = re.compile(r"[0-9a-f]{64}")
_SLUG = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooFile:
    """A file on the hub, or a whole repository of one model.

    Attributes:
        repo: "owner/name".
        filename: Path in the repository; `*` stands for any text (precisions and ranks of one
            model). None is the whole repository.
        sha256: Of the file, hexadecimal.
        fingerprint: Of its tensor names and shapes (`digests.fingerprint`); shared by all LoRAs of
            one rank and target list, so it never decides alone.
        head: Of its first tensor bytes (`digests.head_digest`); decides with the fingerprint.
        expert: The phase it serves ("high_noise", "low_noise"); None where it serves all.
    """

    repo: str
    filename: str | None = None
    sha256: str | None = None
    fingerprint: str | None = None
    head: str | None = None
    expert: str | None = None

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError, where="files[]")
        if not _REPO.fullmatch(self.repo):
            raise RecipeError(f"files[].repo must be owner/name, got {self.repo!r}")
        for name in ("sha256", "fingerprint", "head"):
            value = getattr(self, name)
            if value is not None and not _HEX_64.fullmatch(value):
                raise RecipeError(f"files[].{name} must be 64 hexadecimal digits, got {value!r}")
        if self.filename is not None and (not self.filename or self.filename.startswith("/")):
            raise RecipeError(f"files[].filename must be a path, got {self.filename!r}")

    @property
    def basename(self) -> str | None:
        """The file name without its folder."""
        return None if self.filename is None else PurePosixPath(self.filename).name

    def is_in(self, repo: str) -> bool:
        """Whether it is of this repository; the hub ignores case."""
        return self.repo.lower() == repo.lower()

    def is_at(self, path: str) -> bool:
        """Whether a path in the repository is the one meant."""
        return self.filename is not None and fnmatchcase(path.lower(), self.filename.lower())

    def is_named(self, basename: str) -> bool:
        """Whether a file of this name, folder left out, is the one meant."""
        if self.basename is None:
            return False
        return fnmatchcase(basename.lower(), self.basename.lower())


@dataclass(frozen=True, kw_only=True, slots=True)
class ZooEntry:
    """What the zoo knows of one public few-step model.

    Attributes:
        name: Its name in the zoo; also the name of its JSON file.
        title: For people.
        kind: What the files are: a LoRA, a whole pipeline ("checkpoint"), its denoiser alone, the
            difference of two denoisers, an AnimateDiff motion module, or an adapter with a head
            of its own ("policy").
        family: Short family name, as in recipes.
        files: What is matched.
        base: Hub names of the models it was made for; empty for checkpoints.
        sources: Links that say what the recipe says.
        verification: How far it was checked (`VERIFICATION_TEXT`).
        notes: What a user should know, one or two sentences.
        licence: Of the weights; None where unknown.
        min_versions: Host ("diffusers", "comfyui") -> first version that runs it, where known.
        recipe: How to sample it.
        unsupported: Why fewstep does not sample it, and what to use.
    """

    name: str
    title: str
    kind: Literal["lora", "checkpoint", "denoiser", "delta", "motion_module", "policy"]
    family: str
    files: tuple[ZooFile, ...]
    sources: tuple[str, ...]
    verification: Verification
    notes: str
    base: tuple[str, ...] = ()
    licence: str | None = None
    min_versions: dict[str, str] | None = None
    recipe: FewStepRecipe | None = None
    unsupported: str | None = None

    def __post_init__(self) -> None:
        strict_json.check(self, error=RecipeError)
        if not _SLUG.fullmatch(self.name):
            raise RecipeError(f"name must be small letters, digits, - and ., got {self.name!r}")
        if not self.sources or not all(s.startswith("https://") for s in self.sources):
            raise RecipeError("sources must have at least one link, each starting with https://")
        if self.recipe is None and self.unsupported is None:
            raise RecipeError("a zoo entry needs a recipe, or unsupported to say why it has none")
        if self.recipe is not None and self.recipe.base.family != self.family:
            raise RecipeError(
                f"family is {self.family!r} but the recipe's is {self.recipe.base.family!r}; "
                "make them agree"
            )
        self._check_experts()

    @property
    def is_verified(self) -> bool:
        """Whether somebody who knows said so in writing."""
        return self.verification not in UNVERIFIED

    @property
    def steps_text(self) -> str:
        """Its step counts, for tables."""
        if self.recipe is None:
            return "-"
        counts = _ranges([grid.num_steps for grid in self.recipe.grids])
        return counts if self.recipe.steps == "strict" else f"{counts}, any"

    @property
    def guidance_text(self) -> str:
        """Its guidance, for tables."""
        if self.recipe is None:
            return "-"
        guidance = self.recipe.guidance
        return "none" if guidance.mode == "none" else f"{guidance.mode} {guidance.scale:g}"

    def required_recipe(self) -> FewStepRecipe:
        """The recipe, where fewstep can sample by it.

        Raises:
            RecipeError: It cannot; the message is the entry's own reason.
        """
        if self.unsupported is not None:
            raise RecipeError(
                f"zoo:{self.name} ({self.title}) is not supported: {self.unsupported}"
            )
        assert self.recipe is not None  # __post_init__
        return self.recipe

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def from_file(path: Path) -> "ZooEntry":
        """Read one JSON file; errors name it.

        Raises:
            RecipeError: Not JSON, a broken rule, or another name inside than the file's.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = strict_json.read(ZooEntry, data, error=RecipeError)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}: not valid JSON ({error})") from error
        if path.name != f"{found.name}.json":
            raise RecipeError(f"{path}: the entry inside is called {found.name!r}; rename one")
        return found

    def _check_experts(self) -> None:
        named = {file.expert for file in self.files if file.expert is not None}
        known = {e.adapter for e in self.recipe.experts} if self.recipe is not None else set()
        if named - known:
            raise RecipeError(
                f"files are for the experts {sorted(named)}, but the recipe has {sorted(known)}; "
                "make them agree"
            )


def _ranges(counts: list[int]) -> str:
    """[1, 2, 3, 8] -> "1-3, 8"."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][-1] == count - 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    pairs = ((run[0], run[-1]) for run in runs)
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)
