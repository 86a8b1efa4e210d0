"""Prompts that pictures are compared with."""

from pathlib import Path

from fewstep.errors import ExportError

PROMPTS = (
    "a photograph of a red fox in the snow, early morning",
    "an oil painting of a harbour with fishing boats",
    "a bowl of fruit on a wooden table, studio light",
    "portrait of an old man with a grey beard",
    "a city street at night after the rain, neon signs",
    "a watercolour of a mountain lake",
    "a cup of coffee and an open book, top view",
    "a dog running on a beach",
)
"""Used where no prompts are given; a model of one subject is better measured on its own."""


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """Lines of a text file, or the built-in prompts.

    Raises:
        ExportError: The file cannot be read, or has no line of text.
    """
    if file is None:
        return PROMPTS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{file} cannot be read ({error}); give a text file") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise ExportError(f"{file} has no line of text; write one prompt per line")
    return found
