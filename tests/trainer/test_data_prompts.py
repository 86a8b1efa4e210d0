"""Facts about prompt files: every format gives the same list, every bad row is named."""

import csv
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.errors import ConfigError, MissingExtraError
from fewstep.trainer.data.prompt_files import PromptList, read_prompts

PROMPTS = ("a cat, sleeping", 'a sign that says "open"', "a dog \u2028 in two lines", "\u732b")
GROUPS = ("cats", "signs", "dogs", "cats")


def write_txt(folder: Path) -> Path:
    path = folder / "prompts.txt"
    text = f"{PROMPTS[0]}\r\n\n  {PROMPTS[1]}  \n{PROMPTS[2]}\n{PROMPTS[3]}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    rows = zip(PROMPTS, GROUPS, strict=True)
    lines = [json.dumps({"id": 7, "caption": p, "group": g}) for p, g in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def write_table(folder: Path, suffix: str) -> Path:
    path = folder / f"prompts{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, "excel" if suffix == ".csv" else "excel-tab")
        writer.writerow(["group", "prompt"])
        writer.writerows(zip(GROUPS, PROMPTS, strict=True))
    return path


def write_csv(folder: Path) -> Path:
    return write_table(folder, ".csv")


def write_tsv(folder: Path) -> Path:
    return write_table(folder, ".tsv")


def write_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = folder / "prompts.parquet"
    table = pyarrow.table({"text": PROMPTS, "group": GROUPS, "size": [1, 2, 3, 4]})
    parquet.write_table(table, path, row_group_size=3)
    return path


WRITERS = [write_txt, write_jsonl, write_csv, write_tsv, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_prompts(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    assert read_prompts(str(path)) == PromptList(PROMPTS, source=str(path))
    assert read_prompts(str(path), limit=2).prompts == PROMPTS[:2]
    if path.suffix != ".txt":
        assert read_prompts(str(path), group_column="group").groups == GROUPS


class TestBadRows:
    """Each is an error that names file and row; in skip mode it is counted."""

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"good\n\xff\xfeb\x00a\x00d\n", "line 2: is not UTF-8 (byte 0xff at column 1)"),
        ],
    )
    def test_txt(self, content: bytes, message: str, tmp_path: Path) -> None:
        check_bad(tmp_path / "p.txt", content, message)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"prompt": "bad', "is not JSON (Unterminated string"),
            (b"[" * 100_000, "is not JSON"),
            (b'"only text"', 'is a str; wanted an object, {"prompt": ...}'),
            (b'{"img": 1}', "has no key prompt (it has: img)"),
            (b'{"text": "another key"}', "has no key prompt (it has: text)"),
            (b'{"prompt": " "}', "prompt is empty"),
            (b'{"prompt": null}', "prompt is null; wanted text"),
            (b'{"prompt": ["a"]}', "prompt is a list; wanted text"),
            (b'{"prompt": "\\ud800"}', "prompt is not UTF-8"),
            (b'{"prompt": "\xe4"}', "is not UTF-8 (byte 0xe4 at column 13)"),
        ],
    )
    def test_jsonl(self, line: bytes, message: str, tmp_path: Path) -> None:
        content = b'{"prompt": "good"}\n\n' + line + b"\n"
        check_bad(tmp_path / "p.jsonl", content, f"line 3: {message}")

    def test_jsonl_whose_first_row_has_no_known_key(self, tmp_path: Path) -> None:
        content = b'{"img": 1}\n{"text": "good"}\n'
        check_bad(
            tmp_path / "p.jsonl",
            content,
            "line 1: has no key prompt, text or caption (it has: img)",
        )

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (b"1", "has 1 fields, the header has 2"),
            (
                b"1,a cat, a dog",
                "has 3 fields, the header has 2 (text with separators needs quotes)",
            ),
            (b'1,"  "', "prompt is empty"),
            (b"1,caf\xe9", "prompt is not UTF-8"),
            (b'1,"never closed', "is not a row of a .csv table (unexpected end of data)"),
        ],
    )
    def test_csv(self, row: bytes, message: str, tmp_path: Path) -> None:
        content = b'id,prompt\n0,"good"\n' + row
        check_bad(tmp_path / "p.csv", content, f"line 3: {message}")

    def test_a_csv_row_is_named_by_its_first_line(self, tmp_path: Path) -> None:
        path = tmp_path / "p.csv"
        path.write_text('prompt,n\n"two\nlines",1\n"",2\n')
        with pytest.raises(ConfigError, match="line 4: prompt is empty"):
            read_prompts(str(path))

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        for value, message in [
            (None, "row 2: prompt is null; wanted text"),
            ("", "row 2: prompt is empty"),
        ]:
            path = tmp_path / "p.parquet"
            parquet.write_table(pyarrow.table({"prompt": ["good", value]}), path)
            check_bad(path, path.read_bytes(), message)
        wrong = pyarrow.array([b"good", b"\xff"]).cast(pyarrow.large_binary())
        text = pyarrow.Array.from_buffers(pyarrow.large_string(), 2, wrong.buffers())
        parquet.write_table(pyarrow.table({"prompt": text}), path)
        check_bad(path, path.read_bytes(), "row 2: prompt is not UTF-8")
        parquet.write_table(pyarrow.table({"prompt": [["good"], ["a", "b"]]}), path)
        with pytest.raises(ConfigError, match="row 1: prompt is a list; wanted text"):
            read_prompts(str(path))

    def test_a_parquet_file_with_damaged_pages(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = tmp_path / "p.parquet"
        rows = [f"prompt {number}" for number in range(4000)]
        parquet.write_table(
            pyarrow.table({"prompt": rows}), path, row_group_size=2048, use_dictionary=False
        )
        content = bytearray(path.read_bytes())
        start = parquet.read_metadata(path).row_group(1).column(0).data_page_offset
        content[start : start + 400] = bytes(400)
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="p.parquet is damaged after row 2048"):
            read_prompts(str(path))
        assert len(read_prompts(str(path), limit=2048)) == 2048

    def test_a_missing_group(self, tmp_path: Path) -> None:
        path = tmp_path / "p.jsonl"
        path.write_text('{"prompt": "a", "k": 3}\n{"prompt": "b", "k": true}\n{"prompt": "c"}\n')
        with pytest.raises(ConfigError, match="line 2: k is a bool; wanted text"):
            read_prompts(str(path), group_column="k")
        found = read_prompts(str(path), group_column="k", skip_bad=True)
        assert (found.prompts, found.groups, found.skipped) == (("a",), ("3",), 2)


def check_bad(path: Path, content: bytes, message: str) -> None:
    """The file has one bad row, beside the prompt "good"."""
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_prompts(str(path))
    assert str(caught.value).startswith(f"{path}, {message}")
    assert str(caught.value).endswith("repair it, or set skip_bad to leave such rows out")
    found = read_prompts(str(path), skip_bad=True)
    assert (found.prompts, found.skipped) == (("good",), 1)


def test_skipped_rows_are_counted_and_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nnot json\n{"prompt": ""}\n{"prompt": "b"}\n')
    with caplog.at_level(logging.WARNING, "fewstep"):
        found = read_prompts(str(path), skip_bad=True)
    assert (found.prompts, found.skipped) == (("a", "b"), 2)
    (record,) = caplog.records
    assert record.message.startswith(
        f"{path}: 2 bad rows skipped; the first: {path}, line 2: is not"
    )


def test_a_file_without_one_good_prompt_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": ""}\n')
    with pytest.raises(
        ConfigError, match="no good prompts: all 1 are bad, first: .*line 1: prompt"
    ):
        read_prompts(str(path), skip_bad=True)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="has no prompts; give a source that has some"):
        read_prompts(str(path))


def test_a_file_is_read_no_further_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert read_prompts(str(path), limit=2).prompts == ("a", "b")


class TestWrongSources:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("missing.txt", {}, r"cannot be read \(No such file or directory\); give a .txt, "),
            ("p.json", {}, "is of no known kind; give a .txt, .jsonl, "),
            (".", {}, "is a folder; to read it as a dataset write datasets:"),
            ("p.txt", {"column": "x"}, "has no columns, one prompt per line; name no column"),
            ("p.txt", {"limit": -1}, r"limit must be 0 \(all prompts\) or more, got -1"),
            ("p.csv", {}, r"has no column prompt, text or caption \(it has: a, b\); name its"),
            ("p.csv", {"column": "c"}, r"has no column c \(it has: a, b\)"),
            ("p.csv", {"column": "a", "group_column": "c"}, r"has no column c \(it has: a, b\)"),
            ("empty.csv", {}, "line 1: the file is empty; wanted a header line"),
            ("p.parquet", {}, "cannot be read as a parquet file"),
        ],
    )
    def test_is_told(
        self, name: str, options: dict[str, str], message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "p.json").write_text("[]")
        (tmp_path / "p.txt").write_text("a cat")
        (tmp_path / "p.csv").write_text("a,b\n1,2\n")
        (tmp_path / "p.parquet").write_text("no parquet")
        (tmp_path / "empty.csv").write_text("")
        with pytest.raises(ConfigError, match=message):
            read_prompts(str(tmp_path / name), **options)  # pyright: ignore[reportArgumentType]

    def test_groups_must_fit_the_prompts(self) -> None:
        with pytest.raises(ConfigError, match="has 2 prompts and 1 groups; give one group per"):
            PromptList(("a", "b"), ("x",))

    @pytest.mark.parametrize("package", ["pyarrow", "datasets"])
    def test_a_missing_library_names_the_extra(
        self, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "p.parquet").write_text("")
        monkeypatch.setitem(sys.modules, package, None)
        source = str(tmp_path / "p.parquet") if package == "pyarrow" else "datasets:owner/name"
        with pytest.raises(MissingExtraError, match=r'pip install "fewstep\[data\]"'):
            read_prompts(source)


class TestDatasets:
    """Folders here; a hub id goes through the same call of the library."""

    @pytest.fixture(autouse=True)
    def offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
        datasets.disable_progress_bars()

    def test_a_folder_of_data_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train.jsonl").write_text('{"caption": "a"}\n{"caption": "b", "note": "x"}\n')
        (folder / "test.jsonl").write_text('{"caption": "c"}\n')
        assert read_prompts(f"datasets:{folder}").prompts == ("a", "b")
        assert read_prompts(f"datasets:{folder}:test").prompts == ("c",)
        with pytest.raises(ConfigError, match="row 1: note is null; wanted text"):
            read_prompts(f"datasets:{folder}:train:note")
        with pytest.raises(
            ConfigError, match=r"cannot be read by the datasets library \(Bad split"
        ):
            read_prompts(f"datasets:{folder}:nope")

    def test_folders_that_save_to_disk_wrote(self, tmp_path: Path) -> None:
        import datasets

        features = datasets.Features(
            {"prompt": datasets.Value("string"), "kind": datasets.ClassLabel(names=["cat", "dog"])}
        )
        one = datasets.Dataset.from_dict({"prompt": ["a", "b"], "kind": [1, 0]}, features)
        one.save_to_disk(str(tmp_path / "one"))
        datasets.DatasetDict({"test": one}).save_to_disk(str(tmp_path / "many"))
        found = read_prompts(f"datasets:{tmp_path / 'one'}", group_column="kind")
        assert (found.prompts, found.groups) == (("a", "b"), ("dog", "cat"))
        assert read_prompts(f"datasets:{tmp_path / 'many'}:test").prompts == ("a", "b")
        with pytest.raises(ConfigError, match="has no split train; name one it has"):
            read_prompts(f"datasets:{tmp_path / 'many'}")

    def test_a_damaged_file_is_told(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train.csv").write_text('caption,n\na,1\n"b,2\n')
        with pytest.raises(ConfigError, match="datasets:.*set (cannot be read|is damaged after)"):
            read_prompts(f"datasets:{folder}")

    def test_damage_in_a_later_file_is_told(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train-0.jsonl").write_text('{"caption": "a"}\n')
        (folder / "train-1.jsonl").write_text('{"caption": \n')
        with pytest.raises(ConfigError, match="datasets:.*set is damaged after row 1"):
            read_prompts(f"datasets:{folder}")

    def test_mistakes_in_the_name(self) -> None:
        with pytest.raises(ConfigError, match="cannot be understood; write datasets:NAME, "):
            read_prompts("datasets:a/b:train[:10]:text")
        with pytest.raises(ConfigError, match="names another column than text; name it once"):
            read_prompts("datasets:a/b:train:caption", column="text")
        with pytest.raises(ConfigError, match="cannot be read by the datasets library"):
            read_prompts("datasets:nobody/nothing")
