"""The zoo as a table in docs/zoo.md; `python -m fewstep.zoo docs/zoo.md` writes it anew."""

from collections.abc import Sequence

from fewstep.errors import ConfigError
from fewstep.zoo.entry import ZooEntry

BEGIN = "<!-- zoo table: written by python -m fewstep.zoo docs/zoo.md -->"
END = "<!-- end of zoo table -->"


def with_table(text: str, known: Sequence[ZooEntry]) -> str:
    """A document with the table between its two marks replaced.

    Raises:
        ConfigError: The marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the document has no place for the table; give it {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(known)}\n{END}{after}"


def table(known: Sequence[ZooEntry]) -> str:
    """One Markdown row per entry, grouped by family."""
    lines = ["| entry | family | kind | steps | guidance | checked | fewstep samples it |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for found in sorted(known, key=lambda e: (e.family, e.name)):
        cells = (
            f"[{found.name}]({found.sources[0]})",
            found.family,
            found.kind.replace("_", " "),
            found.steps_text,
            found.guidance_text,
            found.verification.replace("_", " "),
            "yes" if found.unsupported is None else f"no: {found.unsupported}",
        )
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"
