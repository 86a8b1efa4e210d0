"""Facts about pictures and latents as they are found in folders, shards and latent files."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fewstep.errors import ConfigError
from fewstep.trainer.data.images import read_images
from fewstep.trainer.data.latent_files import LatentFiles
from fewstep.trainer.data.pictures import PictureList, decoded


def noise_picture(seed: int, height: int = 24, width: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png(seed: int, height: int = 24, width: int = 16) -> bytes:
    file = io.BytesIO()
    noise_picture(seed, height, width).save(file, "PNG")
    return file.getvalue()


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def make_folder(folder: Path, captions: dict[str, str]) -> Path:
    """Pictures with a .txt beside each."""
    for seed, (name, caption) in enumerate(captions.items()):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(seed))
        file.with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")
    return folder


def make_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))
    return path


def three_pictures() -> dict[str, bytes]:
    return {
        "a/0001.png": png(0),
        "a/0001.txt": b"a cat",
        "a/0002.png": png(1, 10, 30),
        "a/0002.json": b'{"url": "x", "caption": "a dog"}',
        "b/0001.PNG": png(2),
        "b/0001.cls": b"3",
        "b/0001.txt": "a caf\u00e9\n".encode(),
    }


def pictures(source: Path, *, skip_bad: bool = False) -> PictureList:
    found = read_images(str(source), skip_bad=skip_bad)
    assert isinstance(found, PictureList)
    return found


class TestFolder:
    CAPTIONS = {"b.png": "second", "a.png": "first", "sub/c.png": "first"}

    def test_captions_beside_the_pictures_in_the_order_of_paths(self, tmp_path: Path) -> None:
        found = pictures(make_folder(tmp_path / "set", self.CAPTIONS))
        names = [picture.place.name for picture in found.pictures]
        assert names == ["a.png", "b.png", "sub/c.png"]
        assert [picture.caption for picture in found.pictures] == ["first", "second", "first"]
        assert found.captions().prompts == ("first", "second")
        assert {(p.height_px, p.width_px) for p in found.pictures} == {(24, 16)}
        image = decoded(found.pictures[1].place)
        assert np.array_equal(pixels_of(image), pixels_of(noise_picture(0)))

    def test_metadata_as_the_datasets_library_reads_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        (folder / "deep").mkdir(parents=True)
        rows = {"z.png": "last name first", "deep/a.png": "then this"}
        lines: list[str] = []
        for seed, (name, caption) in enumerate(rows.items()):
            (folder / name).write_bytes(png(seed))
            lines.append(json.dumps({"file_name": name, "text": caption}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        ours = {p.place.name: p.caption for p in pictures(folder).pictures}
        assert list(ours.items()) == list(rows.items())

        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        theirs = datasets.load_dataset(str(folder), split="train", streaming=True)
        assert sorted(row["text"] for row in theirs) == sorted(ours.values())

    def test_limit(self, tmp_path: Path) -> None:
        found = read_images(str(make_folder(tmp_path / "set", self.CAPTIONS)), limit=2)
        assert isinstance(found, PictureList)
        assert len(found.pictures) == 2

    def test_a_picture_lies_as_it_is_shown(self, tmp_path: Path) -> None:
        make_folder(tmp_path, {"a.jpg": "turned"})
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate a quarter to show it
        Image.new("RGB", (16, 24)).save(tmp_path / "a.jpg", exif=exif)
        (picture,) = pictures(tmp_path).pictures
        assert (picture.height_px, picture.width_px) == (16, 24)
        assert decoded(picture.place).size == (24, 16)

    def test_what_is_transparent_lies_on_white(self, tmp_path: Path) -> None:
        make_folder(tmp_path, {"a.png": "clear"})
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
        (picture,) = pictures(tmp_path).pictures
        assert pixels_of(decoded(picture.place)).min() == 255


class TestBadPictures:
    """Each is an error that names the file; in skip mode it is counted."""

    def check(self, folder: Path, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            pictures(folder)
        assert message in str(caught.value)
        assert str(caught.value).endswith("or set skip_bad to leave such rows out")
        found = pictures(folder, skip_bad=True)
        assert ([p.caption for p in found.pictures], found.skipped) == (["good"], 1)

    def folder(self, tmp_path: Path) -> Path:
        return make_folder(tmp_path / "set", {"a.png": "good", "b.png": "bad"})

    def test_no_picture(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (folder / "b.png").write_text("<html>")
        self.check(folder, f"{folder}/b.png: is of no picture format that Pillow knows")

    def test_no_caption(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (folder / "b.txt").unlink()
        self.check(folder, f"{folder}/b.png: has no caption; wanted b.txt beside it or a metadata")

    def test_an_empty_caption(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (folder / "b.txt").write_text(" \n")
        self.check(folder, f"{folder}/b.txt: the caption is empty")

    def test_a_caption_in_latin_1(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (folder / "b.txt").write_bytes(b"caf\xe9")
        self.check(folder, f"{folder}/b.txt: the caption is not UTF-8")

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ('{"file_name": "c.png", "text": "x"}', "line 2: names c.png, which is not there"),
            ('{"text": "x"}', "line 2: has no key file_name (it has: text)"),
            ('{"file_name": "b.png"}', "line 2: has no key text (it has: file_name)"),
            ("{", "line 2: is not JSON"),
        ],
    )
    def test_metadata(self, second: str, message: str, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "a.png").write_bytes(png(0))
        if "b.png" in second:
            (folder / "b.png").write_bytes(png(1))
        first = '{"file_name": "a.png", "text": "good"}'
        (folder / "metadata.jsonl").write_text(f"{first}\n{second}\n")
        self.check(folder, f"{folder}/metadata.jsonl, {message}")

    def test_a_picture_that_metadata_does_not_list(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "a.png").write_bytes(png(0))
        (folder / "b.png").write_bytes(png(1))
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "good"}\n')
        self.check(folder, f"{folder}/b.png: is not listed in metadata.jsonl")

    def test_damage_behind_the_header_is_found_when_it_is_decoded(self, tmp_path: Path) -> None:
        from fewstep.trainer.data.rows import BadRowError

        folder = self.folder(tmp_path)
        content = (folder / "b.png").read_bytes()
        (folder / "b.png").write_bytes(content[: len(content) // 2])
        picture = pictures(folder).pictures[1]
        with pytest.raises(BadRowError, match="b.png: cannot be read as a picture"):
            decoded(picture.place)

    def test_sixteen_bits_are_not_clipped(self, tmp_path: Path) -> None:
        from fewstep.trainer.data.rows import BadRowError

        folder = self.folder(tmp_path)
        Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(folder / "b.png")
        picture = pictures(folder).pictures[1]
        with pytest.raises(BadRowError, match="has mode I;16; wanted 8 bits a channel"):
            decoded(picture.place)


class TestShards:
    def test_three_pictures(self, tmp_path: Path) -> None:
        shard = make_shard(tmp_path / "s.tar", three_pictures())
        found = pictures(shard)
        assert [p.caption for p in found.pictures] == ["a cat", "a dog", "a caf\u00e9"]
        assert [(p.height_px, p.width_px) for p in found.pictures] == [(24, 16), (10, 30), (24, 16)]
        for seed, picture in enumerate(found.pictures):
            size = (picture.height_px, picture.width_px)
            expected = pixels_of(noise_picture(seed, *size))
            assert np.array_equal(pixels_of(decoded(picture.place)), expected)

    def test_a_folder_of_shards_is_read_by_name(self, tmp_path: Path) -> None:
        make_shard(tmp_path / "2.tar", {"x.png": png(0), "x.txt": b"second"})
        make_shard(tmp_path / "1.tar", {"x.png": png(1), "x.txt": b"first"})
        found = pictures(tmp_path)
        assert [p.caption for p in found.pictures] == ["first", "second"]

    def test_webdataset_finds_the_same_samples(self, tmp_path: Path) -> None:
        peer = pytest.importorskip("webdataset.tariterators")
        members = three_pictures()
        shard = make_shard(tmp_path / "s.tar", members)
        with shard.open("rb") as file:
            stream = [{"url": str(shard), "stream": file}]
            theirs = list(peer.group_by_keys(peer.tar_file_expander(stream)))
        ours = pictures(shard).pictures
        assert [p.place.member.partition(".")[0] for p in ours] == [s["__key__"] for s in theirs]
        for picture, sample in zip(ours, theirs, strict=True):
            with picture.place.file.open("rb") as file:
                file.seek(picture.place.start)
                assert file.read(picture.place.num_bytes) == sample["png"]

    def test_a_column_reads_json_even_beside_txt(self, tmp_path: Path) -> None:
        members = {"x.png": png(0), "x.txt": b"short", "x.json": b'{"long": "a long caption"}'}
        found = read_images(str(make_shard(tmp_path / "s.tar", members)), column="long")
        assert found.captions().prompts == ("a long caption",)

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({"x.txt": b"bad"}, "member x.*: has 0 pictures, wanted one (it has: txt)"),
            ({"x.png": b"", "x.jpg": b""}, "member x.*: has 2 pictures, wanted one"),
            ({"x.png": png(1)}, "member x.*: has no caption, wanted x.txt or .json"),
            ({"x.png": png(1), "x.json": b"{"}, "member x.json: is not JSON"),
            ({"x.png": png(1), "x.json": b"[]"}, "member x.json: is a list; wanted an object"),
            ({"x.png": png(1), "x.json": b'{"a": 1}'}, "member x.json: has no key prompt, text or"),
            ({"x.png": png(1), "x.txt": b""}, "member x.txt: the caption is empty"),
            ({"x.png": b"no", "x.txt": b"bad"}, "member x.png: is of no picture format"),
        ],
    )
    def test_bad_samples(self, members: dict[str, bytes], message: str, tmp_path: Path) -> None:
        good = {"good.png": png(0), "good.txt": b"good"}
        shard = make_shard(tmp_path / "s.tar", {**good, **members})
        with pytest.raises(ConfigError) as caught:
            pictures(shard)
        assert str(caught.value).startswith(f"{shard}, {message}")
        found = pictures(shard, skip_bad=True)
        assert ([p.caption for p in found.pictures], found.skipped) == (["good"], 1)

    def test_a_member_that_is_there_twice(self, tmp_path: Path) -> None:
        shard = make_shard(tmp_path / "s.tar", {"x.png": png(0), "x.txt": b"one", "x.TXT": b"two"})
        with pytest.raises(ConfigError, match="member x.TXT: is there twice"):
            pictures(shard)
        found = pictures(shard, skip_bad=True)
        assert ([p.caption for p in found.pictures], found.skipped) == (["one"], 1)

    def test_members_without_a_stem_or_a_kind_are_no_samples(self, tmp_path: Path) -> None:
        members = {".hidden": b"", "README": b"text", "x.png": png(0), "x.txt": b"one"}
        assert len(pictures(make_shard(tmp_path / "s.tar", members)).pictures) == 1

    def test_a_shard_that_ends_too_early(self, tmp_path: Path) -> None:
        shard = make_shard(tmp_path / "s.tar", {"a.png": png(0), "a.txt": b"a", "b.png": png(1)})
        content = shard.read_bytes()
        shard.write_bytes(content[: content.index(png(1)) + 100])
        with pytest.raises(ConfigError, match=r"s.tar: ends too early or is damaged"):
            pictures(shard)
        found = pictures(shard, skip_bad=True)
        assert [p.caption for p in found.pictures] == ["a"]

    def test_a_shard_that_ends_within_a_caption(self, tmp_path: Path) -> None:
        members = {"a.png": png(0), "a.txt": b"a", "b.png": png(1), "b.txt": b"b" * 5000}
        shard = make_shard(tmp_path / "s.tar", members)
        shard.write_bytes(shard.read_bytes()[:-12_000])
        found = pictures(shard, skip_bad=True)
        assert [p.caption for p in found.pictures] == ["a"]
        assert found.skipped == 2  # the shard's end, and the sample it cut

    def test_a_compressed_shard_is_refused(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "s.tar", "w:gz"):
            pass
        with pytest.raises(ConfigError, match="cannot be read as an uncompressed tar file"):
            pictures(tmp_path / "s.tar")


class TestLatentFiles:
    def write(self, path: Path, latents: torch.Tensor, prompts: object) -> Path:
        save_file({"latents": latents}, path, metadata={"prompts": json.dumps(prompts)})
        return path

    def test_a_file_and_a_folder_of_them(self, tmp_path: Path) -> None:
        first = self.write(tmp_path / "a.safetensors", torch.ones(2, 4, 8, 8), ["x", "y"])
        self.write(tmp_path / "b.safetensors", torch.zeros(1, 4, 8, 4).half(), ["x"])
        alone, both = read_images(str(first)), read_images(str(tmp_path))
        assert isinstance(alone, LatentFiles)
        assert isinstance(both, LatentFiles)
        assert alone.files[0].prompts == ("x", "y")
        assert torch.equal(alone.files[0].latents, torch.ones(2, 4, 8, 8))
        assert [tuple(file.latents.shape) for file in both.files] == [(2, 4, 8, 8), (1, 4, 8, 4)]
        assert both.captions().prompts == ("x", "y")

    def test_bad_rows(self, tmp_path: Path) -> None:
        latents = torch.arange(4.0).reshape(4, 1, 1, 1).clone()
        latents[1] = float("nan")
        path = self.write(tmp_path / "a.safetensors", latents, ["x", "nan", "", 3])
        with pytest.raises(
            ConfigError, match="a.safetensors, row 2: holds values that are not fin"
        ):
            read_images(str(path))
        found = read_images(str(path), skip_bad=True)
        assert isinstance(found, LatentFiles)
        assert (found.skipped, found.files[0].prompts) == (3, ("x",))
        assert torch.equal(found.files[0].latents, torch.zeros(1, 1, 1, 1))

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            (["", "y"], "row 1: the prompt is empty"),
            ([3, "y"], "row 1: has a int as prompt; wanted text"),
            (["x"], "must be a JSON list of 2 texts, got 1 entries"),
            ("x", "must be a JSON list of 2 texts, got str"),
        ],
    )
    def test_bad_prompts(self, prompts: object, message: str, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.safetensors", torch.ones(2, 4, 8, 8), prompts)
        with pytest.raises(ConfigError, match=message):
            read_images(str(path))

    def test_options_that_mean_nothing_to_latents(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.safetensors", torch.ones(1, 4, 8, 8), ["x"])
        with pytest.raises(ConfigError, match="holds latents, which take no column and no limit"):
            read_images(str(path), limit=1)

    def test_nothing_good_is_left(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.safetensors", torch.ones(1, 4, 8, 8), [""])
        with pytest.raises(ConfigError, match="has no good latents: all 1 are bad, first: .*row 1"):
            read_images(str(path), skip_bad=True)

    def test_files_of_another_kind(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_file({"other": torch.ones(2)}, path)
        with pytest.raises(ConfigError, match=r"has no usable tensor latents \(none\); wanted flo"):
            read_images(str(path))
        save_file({"latents": torch.ones(2, 4)}, path)
        with pytest.raises(ConfigError, match=r"\(torch.float32 of shape \(2, 4\)\)"):
            read_images(str(path))
        save_file({"latents": torch.ones(2, 4, 8, 8)}, path)
        with pytest.raises(ConfigError, match=r"JSON list of 2 texts \(there is none\)"):
            read_images(str(path))
        path.write_bytes(b"no")
        with pytest.raises(ConfigError, match="cannot be read as a safetensors file"):
            read_images(str(path))


class TestWrongSources:
    def test_are_told(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist; give a folder of pictures, .tar"):
            read_images(str(tmp_path / "missing"))
        with pytest.raises(ConfigError, match="holds neither pictures, shards nor latents; give"):
            read_images(str(tmp_path))
        make_folder(tmp_path, {"a.png": "a"})
        with pytest.raises(ConfigError, match="has no metadata.jsonl, so no column text"):
            read_images(str(tmp_path), column="text")
        with pytest.raises(ConfigError, match="limit must be 0"):
            read_images(str(tmp_path), limit=-1)
        make_shard(tmp_path / "s.tar", three_pictures())
        with pytest.raises(ConfigError, match="holds pictures and .tar shards; give"):
            read_images(str(tmp_path))

    def test_nothing_good_is_left(self, tmp_path: Path) -> None:
        make_shard(tmp_path / "s.tar", {"x.txt": b"no picture"})
        with pytest.raises(ConfigError, match="has no good pictures: all 1 are bad, first: "):
            read_images(str(tmp_path / "s.tar"), skip_bad=True)
