"""What a verb says and where: results on stdout, progress and errors on stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputOptions:
    """How a verb reports."""

    quiet: bool = False
    """Say nothing but errors (and the JSON object, with --json)."""
    json: bool = False
    """Print one JSON object on stdout, for programs, in place of the text."""


class Output:
    """Prints a verb's result once, as text for people or as JSON for programs.

    Args:
        options: What the user asked for.
    """

    def __init__(self, options: OutputOptions) -> None:
        self.options = options

    @property
    def is_silent(self) -> bool:
        """Whether progress bars and text are unwanted."""
        return self.options.quiet or self.options.json

    def progress(self) -> Progress:
        """Progress bars on stderr, invisible when text is unwanted; use it with `with`."""
        return Progress(console=Console(stderr=True), disable=self.is_silent, transient=True)

    def result(self, data: Mapping[str, Any], text: str | Table) -> None:
        """Print the result.

        Args:
            data: The result as JSON values.
            text: The same for people; not interpreted as markup.
        """
        if self.options.json:
            text = json.dumps(data, indent=2, allow_nan=False)
        elif self.options.quiet:
            return
        elif isinstance(text, Table):
            text = _rendered(text)
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()  # a reader that has gone is found out here, not at exit


def _rendered(table: Table) -> str:
    """The table as this terminal shows it (rich would exit by itself on a closed pipe)."""
    console = Console(highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    """One line per row, with these columns."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_text = any(isinstance(row[column], str) for row in rows)
        table.add_column(column, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*(_shown(row[column]) for column in columns))
    return table


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
