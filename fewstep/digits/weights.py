"""Where the shipped digits weights are, and the teachers as ordinary diffusers folders.

The package holds each component once, in float16 (the two teachers share the autoencoder).
`teacher_folder` lays a teacher out as a complete pipeline folder in the user's cache, so that
everything else can use a plain `from_pretrained`.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from fewstep.errors import ConfigError

WEIGHTS = Path(__file__).parent / "weights"
SHARED = ("vae",)


def teacher_folder(kind: str) -> Path:
    """A teacher as a diffusers folder; laid out on first use, then reused.

    Args:
        kind: "sd3" (flow, StableDiffusion3Pipeline) or "sd15" (epsilon, StableDiffusionPipeline).

    Returns:
        A folder `DiffusionPipeline.from_pretrained` loads.

    Raises:
        ConfigError: No such teacher.
    """
    if not (WEIGHTS / kind / "model_index.json").is_file():
        raise ConfigError(f"there is no digits teacher {kind!r}; use sd3 or sd15")
    folder = cache_root() / f"{kind}-{weights_checksum()[:16]}"
    if not folder.exists():
        _lay_out(kind, folder)
    return folder


def cache_root() -> Path:
    """Where teachers are laid out: FEWSTEP_CACHE, else beside the Hugging Face cache."""
    return Path(os.environ.get("FEWSTEP_CACHE", Path(HF_HOME) / "fewstep")) / "digits"


def weights_checksum() -> str:
    """One sha256 over the names and bytes of all shipped weights: what scores belong to."""
    digest = hashlib.sha256()
    for file in sorted(WEIGHTS.rglob("*")):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".txt"):
            digest.update(file.relative_to(WEIGHTS).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _lay_out(kind: str, folder: Path) -> None:
    """Copy into a temporary folder, then rename: two processes may race, neither sees half."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "teacher"
        shutil.copytree(WEIGHTS / kind, made)
        for name in SHARED:
            shutil.copytree(WEIGHTS / name, made / name)
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.exists():
                raise
