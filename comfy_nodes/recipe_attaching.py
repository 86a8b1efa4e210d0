"""Where a copy of a LoRA that carries a recipe goes. No ComfyUI here."""

from pathlib import PurePath

from fewstep.errors import ConfigError

SUFFIX = ".safetensors"
FORBIDDEN = frozenset('/\\:*?"<>|')
"""What makes a path of a name, or no name at all on some system."""


def copy_name(wanted: str, lora_name: str) -> str:
    """The file name of a copy.

    Args:
        wanted: What the user wrote; empty takes the name of the LoRA with "-few-step" behind it.
        lora_name: The LoRA as ComfyUI lists it, perhaps in a sub-folder.

    Raises:
        ConfigError: It is not the name of a file in one folder.
    """
    name = wanted.strip()
    if not name:
        return f"{PurePath(lora_name.replace(chr(92), '/')).stem}-few-step{SUFFIX}"
    if FORBIDDEN & set(name) or name.startswith(".") or not name.isprintable():
        raise ConfigError(
            f"file_name {name!r} is not a plain file name; write one without folders, it is saved "
            "in the loras folder."
        )
    return name if name.endswith(SUFFIX) else name + SUFFIX
