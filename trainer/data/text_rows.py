"""Rows of text files, one line at a time: .txt, .jsonl, .csv and .tsv.

Lines end at a line feed and nowhere else: `str.splitlines` also cuts at U+2028 and at form feeds,
which are found inside captions. A blank line is no row, in every format.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import ConfigError
from fewstep.trainer.data.rows import BadRowError, Row, Table, choose_column

BOM = b"\xef\xbb\xbf"
DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}


def open_text(path: Path) -> Table:
    """One prompt per line."""
    return Table(_text_rows(path), "prompt")


def open_json_lines(path: Path, column: str) -> Table:
    """One JSON object per line."""
    return Table(json_rows(path), column)


def open_csv(path: Path, column: str, group_column: str) -> Table:
    """A table with a header line; columns by commas (.csv) or tabs (.tsv).

    Raises:
        ConfigError: There is no header with the column.
    """
    where, header, problem = next(_csv_fields(path), ("line 1", [], "the file is empty"))
    if problem:
        raise ConfigError(f"{path}, {where}: {problem}; wanted a header line")
    names = [name.strip() for name in header]
    chosen = choose_column(names, column, str(path))
    if group_column:
        choose_column(names, group_column, str(path))
    return Table(_csv_rows(path, names), chosen)


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a .jsonl file."""
    for where, line in _lines(path):
        try:
            found = json.loads(_decoded(line, where))
        except BadRowError as error:
            yield Row(where, problem=error.problem)
        except (ValueError, RecursionError) as error:
            yield Row(where, problem=f"is not JSON ({error})")
        else:
            yield _object_row(where, found)


def _object_row(where: str, found: object) -> Row:
    if isinstance(found, dict):
        return Row(where, found)
    return Row(where, problem=f'is a {type(found).__name__}; wanted an object, {{"prompt": ...}}')


def _text_rows(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        try:
            yield Row(where, {"prompt": _decoded(line, where)})
        except BadRowError as error:
            yield Row(where, problem=error.problem)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """("line 1", bytes) of every line that is not blank, without a byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield f"line {number}", line.rstrip(b"\r\n")


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise BadRowError(
            where, f"is not UTF-8 (byte 0x{byte:02x} at column {error.start + 1})"
        ) from error


def _csv_rows(path: Path, names: list[str]) -> Iterator[Row]:
    """The rows after the header, by column name."""
    rows = _csv_fields(path)
    next(rows)
    for where, fields, problem in rows:
        if not problem and len(fields) != len(names):
            problem = (
                f"has {len(fields)} fields, the header has {len(names)} (text with separators "
                "needs quotes)"
            )
        yield Row(where, {} if problem else dict(zip(names, fields, strict=True)), problem)


def _csv_fields(path: Path) -> Iterator[tuple[str, list[str], str]]:
    """(where, fields, problem) of every row, header included; bytes that are not UTF-8 are kept."""
    with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, DIALECTS[path.suffix.lower()], strict=True)
        while True:
            where = f"line {reader.line_num + 1}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # the reader goes on with the next line
                yield where, [], f"is not a row of a {path.suffix} table ({error})"
                continue
            if fields:
                yield where, fields, ""
