"""An export folder on this machine: manifest, recipe and tokenizers, checked when it is opened."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.errors import ExportFolderError
from fewstep.recipe import SIDECAR_NAME, FewStepRecipe
from fewstep.runtime.manifest import Manifest, read_manifest
from fewstep.runtime.tokens import PromptTokenizer


@dataclass(frozen=True, slots=True)
class ExportFolder:
    """Made by `open`.

    Attributes:
        root: Where it lies.
        manifest: What it holds.
        recipe: How it is sampled.
    """

    root: Path
    manifest: Manifest
    recipe: FewStepRecipe
    _tokenizers: dict[str, PromptTokenizer] = field(default_factory=dict)

    @staticmethod
    def open(root: str | Path, *, verify: bool = False) -> "ExportFolder":
        """Read and check a folder.

        Args:
            root: The folder.
            verify: Whether checksums are compared, not only presence and size.

        Raises:
            ExportFolderError: A file is missing, cut short or (with `verify`) changed, or the
                folder is of another release.
            RecipeError: Its recipe is damaged or of a newer release.
        """
        folder = Path(root)
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        if verify:
            check_sums(folder, manifest)
        return ExportFolder(folder, manifest, FewStepRecipe.from_file(folder / SIDECAR_NAME))

    def tokenizer(self, name: str) -> PromptTokenizer:
        """One of its tokenizers, read once."""
        if name not in self._tokenizers:
            self._tokenizers[name] = PromptTokenizer(self.root / name)
        return self._tokenizers[name]


def check_files(folder: Path, manifest: Manifest) -> None:
    """See that every file is there in its full length.

    Raises:
        ExportFolderError: The first that is not.
    """
    for name, stored in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ExportFolderError(f"{name} is missing from {folder}; copy the whole folder again")
        if (size := file.stat().st_size) != stored.bytes:
            raise ExportFolderError(
                f"{name} in {folder} has {size} bytes where {stored.bytes} were written; copy or "
                "export it again"
            )


def check_sums(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the checksum it was written with.

    Raises:
        ExportFolderError: The first that was changed.
    """
    for name, stored in manifest.files.items():
        if file_sha256(folder / name) != stored.sha256:
            raise ExportFolderError(
                f"{name} in {folder} is not the file that was written (its checksum differs); "
                f"export again, or run `fewstep export check {folder} --rewrite` if you changed it "
                "on purpose"
            )


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        ExportFolderError: It is missing.
    """
    if not file.is_file():
        raise ExportFolderError(f"{file} is missing; copy the whole folder, or export again")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
