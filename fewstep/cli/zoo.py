"""`fewstep zoo`: what is known of public few-step models. Reads JSON and headers only; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from fewstep.cli.output import Output, OutputOptions
from fewstep.errors import ConfigError

if TYPE_CHECKING:
    from fewstep.adapters import AdapterHeader
    from fewstep.zoo import ZooEntry

HELP = """\
Look up public few-step models: how each wants to be sampled, who says so, and whether fewstep can.
An adapter that comes from a known repository needs nothing of this; for other copies of it, pass
recipe="zoo:NAME". All four take --json and --quiet.

Examples:
  fewstep zoo list --family sdxl
  fewstep zoo show dmd2-sdxl-4step-lora
  fewstep zoo show dmd2-sdxl-4step-lora --recipe-only   the recipe alone, as a file would hold it
  fewstep zoo search wan 2.2 lightning
  fewstep zoo fingerprint adapter.safetensors   what it is, and the digests an entry needs"""

COLUMNS = ("name", "family", "steps", "samples", "source", "kind", "guidance")


@dataclass(frozen=True, kw_only=True, slots=True)
class ListEntries:
    """List the zoo."""

    family: str | None = None
    """Only models of this family: sd15, sdxl, sd3, flux, qwen-image, wan, ..."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowEntry:
    """Show one entry: its files, sources, notes and recipe."""

    name: Positional[str]
    """Its name, as `fewstep zoo list` prints it."""
    recipe_only: bool = False
    """Print the recipe alone; redirected into a file, it is one that --recipe takes. A model that
    fewstep does not sample has none to give; without this option its numbers are shown."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchEntries:
    """Find entries by words in their names, files, bases and notes; all words must be there."""

    words: Positional[tuple[str, ...]]
    """What to look for; the case does not matter."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Say which entry a file is, and print the digests that an entry would list."""

    file: Positional[Path]
    """A weights file; a whole one of several gigabytes takes a while to read."""
    output: OmitArgPrefixes[OutputOptions] = OutputOptions()


Action = (
    Annotated[ListEntries, subcommand("list")]
    | Annotated[ShowEntry, subcommand("show")]
    | Annotated[SearchEntries, subcommand("search")]
    | Annotated[Fingerprint, subcommand("fingerprint")]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Zoo:
    """Look up public few-step models: list, show, search, fingerprint."""

    action: OmitSubcommandPrefixes[OmitArgPrefixes[Action]]

    @property
    def output(self) -> OutputOptions:
        """How to report; each action has these options itself."""
        return self.action.output


def run(options: Zoo, output: Output) -> None:
    """Look up and print."""
    action = options.action
    if isinstance(action, ListEntries):
        _list(action, output)
    elif isinstance(action, ShowEntry):
        _show(action, output)
    elif isinstance(action, SearchEntries):
        _search(action, output)
    else:
        _fingerprint(action, output)


def _list(options: ListEntries, output: Output) -> None:
    from fewstep.zoo import entries

    known = entries()
    families = sorted({found.family for found in known})
    if options.family is not None and options.family not in families:
        raise ConfigError(f"the zoo has no family {options.family!r}; it has {', '.join(families)}")
    _print([e for e in known if options.family in (None, e.family)], output, "the zoo is empty")


def _search(options: SearchEntries, output: Output) -> None:
    from fewstep.zoo import search_entries

    if not options.words:
        raise ConfigError("give at least one word to search for, such as: fewstep zoo search sdxl")
    nothing = f"no entry of the zoo has all of: {' '.join(options.words)}"
    _print(search_entries(options.words), output, nothing)


def _print(found: Sequence["ZooEntry"], output: Output, nothing: str) -> None:
    rows = [summary(each) for each in found]
    output.result({"entries": rows}, _table(rows) if rows else nothing)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned columns at their full width: a name that is cut cannot be copied further."""
    lines = [{column: column for column in COLUMNS}, *rows]
    widths = {column: max(len(line[column]) for line in lines) for column in COLUMNS}
    return "\n".join(
        "  ".join(line[column].ljust(widths[column]) for column in COLUMNS).rstrip()
        for line in lines
    )


def summary(found: "ZooEntry") -> dict[str, Any]:
    """One line about an entry, as JSON values; the columns of `COLUMNS`."""
    return {
        "name": found.name,
        "family": found.family,
        "kind": found.kind.replace("_", " "),
        "steps": found.steps_text,
        "guidance": found.guidance_text,
        "source": found.verification.replace("_", " "),
        "samples": "yes" if found.unsupported is None else "no",
    }


def _show(options: ShowEntry, output: Output) -> None:
    from fewstep.zoo import entry

    found = entry(options.name)
    data = found.to_dict()
    if not options.recipe_only:
        output.result(data, _entry_text(found))
    else:
        output.result(data["recipe"], found.required_recipe().to_json(indent=2))


def _entry_text(found: "ZooEntry") -> str:
    from fewstep.zoo.entry import VERIFICATION_TEXT

    checked = VERIFICATION_TEXT[found.verification]
    rows = [
        ("name", f"zoo:{found.name}"),
        ("title", found.title),
        ("kind", f"{found.kind.replace('_', ' ')} for {found.family}"),
        *(("file", _file_text(file.repo, file.filename, file.expert)) for file in found.files),
        *(("base", base) for base in found.base),
        ("licence", found.licence or "not known here"),
        ("checked", checked if found.is_verified else f"UNVERIFIED, {checked}"),
        *(("link", link) for link in found.sources),
        *((f"{host} from", first) for host, first in (found.min_versions or {}).items()),
        ("notes", found.notes),
    ]
    if found.unsupported is not None:
        rows.append(("refused", found.unsupported))
    lines = [f"{name:<14} {value}" for name, value in rows]
    if found.recipe is not None:
        lines += ["", found.recipe.to_json(indent=2)]
    return "\n".join(lines)


def _file_text(repo: str, filename: str | None, expert: str | None) -> str:
    text = repo if filename is None else f"{repo}/{filename}"
    return text if expert is None else f"{text} ({expert})"


def of_header(header: "AdapterHeader") -> dict[str, Any]:
    """What the zoo knows of a file, as JSON values: its entry, found by what, or similar ones."""
    from fewstep.zoo import likely_entries, match_adapter

    match = match_adapter(header)
    return {
        "entry": None if match is None else match.entry.name,
        "found_by": None if match is None else match.how,
        "similar": [found.name for found in likely_entries(header)] if match is None else [],
    }


def _fingerprint(options: Fingerprint, output: Output) -> None:
    from fewstep.adapters import read_header
    from fewstep.errors import AdapterError
    from fewstep.zoo.digests import file_sha256, fingerprint, head_digest

    data: dict[str, Any] = {"file": str(options.file), "sha256": file_sha256(options.file)}
    try:
        header = read_header(options.file)
    except AdapterError:
        if options.file.suffix == ".safetensors":
            raise  # only other formats, such as pickles, have a sha256 and nothing else
        output.result(data, "\n".join(f"{key:<12} {value}" for key, value in data.items()))
        return
    data["fingerprint"] = fingerprint(header)
    data["head"] = head_digest(header)
    data["tensors"] = len(header.tensors)
    data |= of_header(header)
    rows = {**data, "entry": data["entry"] or "none", "found_by": data["found_by"] or "-"}
    rows["similar"] = ", ".join(data["similar"]) or "-"
    output.result(data, "\n".join(f"{key:<12} {value}" for key, value in rows.items()))
