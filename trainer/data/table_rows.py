"""Rows of parquet files and of `datasets`: their libraries are imported when they are needed."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import ConfigError, MissingExtraError
from fewstep.trainer.data.rows import Row, Table, choose_column

BATCH_ROWS = 1024
PREFIX = "datasets:"
FORM = "datasets:NAME, datasets:NAME:SPLIT or datasets:NAME:SPLIT:COLUMN"
_SOURCE = re.compile(
    r"datasets:(?P<name>(?:[A-Za-z]:[\\/])?[^:]+)(?::(?P<split>[^:]+)(?::(?P<column>[^:]+))?)?"
)


def open_parquet(path: Path, column: str, group_column: str) -> Table:
    """A parquet file, read in batches of `BATCH_ROWS` and only the columns that are used.

    Raises:
        ConfigError: No parquet file, or no such column.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a parquet file ({error})") from error
    chosen = choose_column(names, column, str(path))
    wanted = [chosen]
    if group_column:
        wanted.append(choose_column(names, group_column, str(path)))
    return Table(_parquet_rows(path, wanted), chosen)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(path) as file:
        batches = file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(columns)))
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pyarrow.ArrowException, OSError) as error:
                raise ConfigError(f"{path} is damaged after row {number} ({error})") from error
            values = {name: _values(batch.column(name)) for name in batch.schema.names}
            for offset in range(batch.num_rows):
                number += 1
                yield Row(f"row {number}", {name: values[name][offset] for name in values})


def _values(array: Any) -> list[object]:
    """A column as Python values; text that is not UTF-8 keeps its bytes as surrogates."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (types.is_string(array.type) or types.is_large_string(array.type)):
        return array.to_pylist()
    found = array.cast(pyarrow.large_binary()).to_pylist()
    return [None if v is None else v.decode("utf-8", "surrogateescape") for v in found]


def open_dataset(source: str, column: str, group_column: str) -> Table:
    """A `datasets` hub id, a folder of data files, or a folder that `save_to_disk` wrote.

    Args:
        source: `FORM`; the split is "train" unless named.
        column: The prompts' column, where the source does not name it.
        group_column: A second column, or "".

    Raises:
        ConfigError: The source cannot be read that way, or has no such column.
        MissingExtraError: `datasets` is not installed.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ConfigError(f"{source} cannot be understood; write {FORM} (limit takes the first N)")
    if column and match["column"] and column != match["column"]:
        raise ConfigError(f"{source} names another column than {column}; name it once")
    data, names = _load(source, match["name"], match["split"] or "train")
    chosen = choose_column(names, match["column"] or column, source)
    wanted = [chosen]
    if group_column:
        wanted.append(choose_column(names, group_column, source))
    return Table(_dataset_rows(source, data.select_columns(list(dict.fromkeys(wanted)))), chosen)


def _load(source: str, name: str, split: str) -> tuple[Any, list[str]]:
    """A dataset that is read as it is iterated, and the names of its columns."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingExtraError("datasets", "data") from error
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file():
            data = datasets.DatasetDict.load_from_disk(str(folder))[split]
        elif (folder / "state.json").is_file():
            data = datasets.Dataset.load_from_disk(str(folder))
        else:
            path = str(folder) if folder.is_dir() else name
            data = datasets.load_dataset(path, split=split, streaming=True)
        # A stream without a schema knows its columns by its first row only.
        return data, data.column_names or list(next(iter(data), {}))
    except KeyError as error:
        raise ConfigError(f"{source} has no split {split}; name one it has") from error
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"{source} cannot be read by the datasets library ({error}); wanted {FORM}"
        ) from error


def _dataset_rows(source: str, data: Any) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    names = {
        name: feature.names
        for name, feature in (data.features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    number = 0
    rows = iter(data)
    while True:
        try:
            values = next(rows)
        except StopIteration:
            return
        except (OSError, ValueError, DatasetsError) as error:
            raise ConfigError(f"{source} is damaged after row {number} ({error})") from error
        number += 1
        yield Row(f"row {number}", {k: _class_name(v, names.get(k)) for k, v in values.items()})


def _class_name(value: object, names: list[str] | None) -> object:
    """The name of a class label's number; other values as they are."""
    return names[value] if names and isinstance(value, int) and value >= 0 else value
