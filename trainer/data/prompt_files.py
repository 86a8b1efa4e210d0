"""Prompts from a file or a dataset: .txt, .jsonl, .csv, .tsv, .parquet or `datasets:NAME`."""

from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import ConfigError
from fewstep.trainer.data.rows import BadRowError, BadRows, Table, known_key
from fewstep.trainer.data.table_rows import PREFIX, open_dataset, open_parquet
from fewstep.trainer.data.text_rows import open_csv, open_json_lines, open_text

WANTED = "a .txt, .jsonl, .csv, .tsv or .parquet file, or datasets:NAME"


@dataclass(frozen=True, slots=True)
class PromptList:
    """Prompts as they were read, in order, repetitions kept.

    Attributes:
        prompts: N texts, none empty.
        groups: N labels (a class, a cluster), or none at all.
        skipped: Bad rows that were left out.
        source: Where they are from.
    """

    prompts: tuple[str, ...]
    groups: tuple[str, ...] = ()
    skipped: int = 0
    source: str = "given prompts"

    def __post_init__(self) -> None:
        if self.groups and len(self.groups) != len(self.prompts):
            raise ConfigError(
                f"{self.source} has {len(self.prompts)} prompts and {len(self.groups)} groups; "
                "give one group per prompt, or none"
            )

    def __len__(self) -> int:
        return len(self.prompts)


def read_prompts(
    source: str,
    *,
    column: str = "",
    group_column: str = "",
    skip_bad: bool = False,
    limit: int = 0,
) -> PromptList:
    """Read prompts as a stream; only the prompts themselves are kept.

    A bad row is not UTF-8, not JSON or not a row of the table, or its prompt (or group) is
    missing, null, empty or no text.

    Args:
        source: A file by its suffix, or `datasets:NAME[:SPLIT[:COLUMN]]`.
        column: The prompts' column or key; "" takes prompt, text or caption.
        group_column: Column or key of each prompt's group, text or whole numbers; "" for none.
        skip_bad: Count bad rows and warn once, instead of raising at the first.
        limit: Stop after so many prompts; 0 reads all.

    Raises:
        ConfigError: The source cannot be read, has no such column or no prompt, or a row is bad:
            the message names file and line (or row), counted from 1.
        MissingExtraError: The library for parquet or datasets is not installed.
    """
    if limit < 0:
        raise ConfigError(f"limit must be 0 (all prompts) or more, got {limit}")
    table = _open(source, column, group_column)
    bad = BadRows(source, skip=skip_bad)
    prompts: list[str] = []
    groups: list[str] = []
    chosen = table.column
    for row in table.rows:
        chosen = chosen or known_key(row.values)  # one key for the whole file: the first row's
        try:
            prompt = row.text(chosen)
            group = row.label(group_column) if group_column else ""
        except BadRowError as error:
            bad.meet(error)
            continue
        prompts.append(prompt)
        groups.append(group)
        if len(prompts) == limit:
            break
    if not prompts:
        raise bad.nothing_left("prompts")
    bad.warn()
    return PromptList(tuple(prompts), tuple(groups) if group_column else (), bad.count, source)


def _open(source: str, column: str, group_column: str) -> Table:
    if source.startswith(PREFIX):
        return open_dataset(source, column, group_column)
    path = Path(source).expanduser()
    if path.is_dir():
        raise ConfigError(f"{source} is a folder; to read it as a dataset write datasets:{source}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({error.strerror}); give {WANTED}") from error
    suffix = path.suffix.lower()
    if suffix == ".txt":
        if column or group_column:
            raise ConfigError(f"{source} has no columns, one prompt per line; name no column")
        return open_text(path)
    if suffix == ".jsonl":
        return open_json_lines(path, column)
    if suffix in (".csv", ".tsv"):
        return open_csv(path, column, group_column)
    if suffix == ".parquet":
        return open_parquet(path, column, group_column)
    raise ConfigError(f"{source} is of no known kind; give {WANTED}")
