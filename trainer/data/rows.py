"""Rows of any table, and what happens to the bad ones: an error that names them, or a count.

A reader yields a `Row` for every row, also for one it could not parse (that row carries its
problem), so that one loop decides about all of them.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fewstep.errors import ConfigError

logger = logging.getLogger(__name__)

PROMPT_KEYS = ("prompt", "text", "caption")
"""Columns taken for the prompt when none is named, first match wins."""


class BadRowError(Exception):
    """One row cannot be used; `BadRows.meet` makes the user's error of it.

    Args:
        where: The row, for example "line 3"; "" where the source's name says it already.
        problem: What is wrong, as the end of a sentence.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where = where
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was found.

    Attributes:
        where: "line 3" or "row 3", counted from 1.
        values: Column or key -> value of any type.
        problem: Why the row could not be parsed; "" if it was.
    """

    where: str
    values: Mapping[str, object] = field(default_factory=dict)
    problem: str = ""

    def text(self, column: str) -> str:
        """The stripped text of a column; "" as column means that no known key was found.

        Raises:
            BadRowError: The row is broken, or the value is missing, empty or no text.
        """
        value = self._value(column)
        if not isinstance(value, str):
            raise BadRowError(self.where, f"{column} is {_kind(value)}; wanted text")
        return checked_text(value, self.where, column)

    def label(self, column: str) -> str:
        """A text or whole number of a column, as text.

        Raises:
            BadRowError: As `text`.
        """
        value = self._value(column)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(column)

    def _value(self, column: str) -> object:
        if self.problem:
            raise BadRowError(self.where, self.problem)
        if column not in self.values:
            wanted = f"key {column}" if column else f"key {listed(PROMPT_KEYS)}"
            raise BadRowError(self.where, f"has no {wanted} (it has: {', '.join(self.values)})")
        return self.values[column]


@dataclass(frozen=True, slots=True)
class Table:
    """A file opened for reading.

    Attributes:
        rows: Its rows, read as they are asked for.
        column: The prompts' column; "" where every row has keys of its own.
    """

    rows: Iterator[Row]
    column: str


class BadRows:
    """The bad rows of one source: the first is an error, or all are counted and warned of once.

    Args:
        source: The file's name as the user knows it.
        skip: Leave bad rows out instead of raising.
    """

    def __init__(self, source: str, *, skip: bool) -> None:
        self.source = source
        self.count = 0
        self._skip = skip
        self._first = ""

    def meet(self, error: BadRowError) -> None:
        """Raise or count one.

        Raises:
            ConfigError: Bad rows are not to be skipped.
        """
        # A row of a file is "file, line 3: ..."; a row that is a file of its own needs no more.
        named = f"{self.source}, {error}" if error.where.startswith(("line ", "row ")) else error
        if not self._skip:
            raise ConfigError(
                f"{named}; repair it, or set skip_bad to leave such rows out"
            ) from error
        self.count += 1
        self._first = self._first or str(named)

    def warn(self) -> None:
        """One warning for all that were skipped."""
        if self.count:
            logger.warning("%s: %d bad rows skipped; the first: %s", *self._facts())

    def nothing_left(self, what: str) -> ConfigError:
        """The error for a source in which no good row was found."""
        if self.count:
            source, count, first = self._facts()
            return ConfigError(f"{source} has no good {what}: all {count} are bad, first: {first}")
        return ConfigError(f"{self.source} has no {what}; give a source that has some")

    def _facts(self) -> tuple[str, int, str]:
        return self.source, self.count, self._first


def checked_text(value: str, where: str, column: str) -> str:
    """The text without surrounding white space.

    Raises:
        BadRowError: Nothing is left, or it is no valid Unicode.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes that were kept as surrogates, or "\ud800" in JSON
        raise BadRowError(where, f"{column} is not UTF-8") from error
    if not value.strip():
        raise BadRowError(where, f"{column} is empty")
    return value.strip()


def known_key(names: Iterable[str]) -> str:
    """The first of `PROMPT_KEYS` among the names, or ""."""
    present = set(names)
    return next((key for key in PROMPT_KEYS if key in present), "")


def choose_column(names: Sequence[str], column: str, source: str) -> str:
    """The prompts' column of a table with a header.

    Raises:
        ConfigError: It is not there.
    """
    found = column if column in names else ("" if column else known_key(names))
    if not found:
        wanted = column or listed(PROMPT_KEYS)
        raise ConfigError(
            f"{source} has no column {wanted} (it has: {', '.join(names)}); name its column"
        )
    return found


def listed(words: Sequence[str]) -> str:
    """ "a, b or c"."""
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
