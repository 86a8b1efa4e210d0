"""Facts about prompt books and latent books, on the shipped flow teacher and real digits."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.digits.autoencoder import encode_all
from fewstep.digits.data import Digits, all_prompts, load_digits, prompt_for
from fewstep.digits.judge import DigitsJudge
from fewstep.digits.weights import teacher_folder
from fewstep.errors import ConfigError, ShapeError
from fewstep.trainer.backbones.backbone import Backbone
from fewstep.trainer.backbones.condition import Condition
from fewstep.trainer.backbones.loading import load_backbone, wrap_pipeline
from fewstep.trainer.data import picture_latents, prompt_book
from fewstep.trainer.data.condition_shards import ConditionShards, joined
from fewstep.trainer.data.images import read_images
from fewstep.trainer.data.latent_book import (
    LatentBook,
    LatentBucket,
    build_latent_book,
    digits_latents,
    latents_of_digits,
)
from fewstep.trainer.data.pictures import PictureList
from fewstep.trainer.data.prompt_book import build_prompt_book
from fewstep.trainer.data.prompt_files import PromptList

PROMPTS = PromptList(
    tuple(prompt for prompt, _ in all_prompts()), tuple(str(label) for _, label in all_prompts())
)
TWO = PromptList(("a handwritten one", "a handwritten two"))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(
        str(teacher_folder("sd3")),
        precision=torch.float32,
        device=torch.device("cpu"),
        max_sequence_length=1,
    )


class Counter:
    """Rows that went through a network."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.rows += len(args[0])


@contextmanager
def counted(network: nn.Module) -> Iterator[Counter]:
    counter = Counter()
    handle = network.register_forward_pre_hook(counter)
    try:
        yield counter
    finally:
        handle.remove()


@contextmanager
def changed(weight: Tensor, value: float) -> Iterator[None]:
    """Another value in one weight; put back afterwards."""
    before = weight.flatten()[0].clone()
    weight.view(-1)[0] = value
    try:
        yield
    finally:
        weight.view(-1)[0] = before


def same(first: Condition, second: Condition) -> bool:
    assert first.pooled is not None
    assert second.pooled is not None
    return torch.equal(first.sequence, second.sequence) and torch.equal(first.pooled, second.pooled)


class TestPromptBook:
    def test_it_holds_what_the_pipeline_encodes(self, backbone: Backbone) -> None:
        book = build_prompt_book(backbone, PROMPTS)
        assert (book.prompts, book.groups) == (PROMPTS.prompts, PROMPTS.groups)
        chosen = torch.tensor([69, 0, 0, 33])
        expected = backbone.encode([PROMPTS.prompts[i] for i in chosen])
        found = book.take(chosen)
        assert torch.allclose(found.sequence, expected.sequence, atol=1e-5)
        assert found.pooled is not None
        assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)  # pyright: ignore
        assert same(book.null_condition, backbone.encode([""]))

    def test_a_second_run_does_not_call_the_encoders(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        plain = build_prompt_book(backbone, PROMPTS)
        with counted(backbone.pipe.text_encoder) as counter:
            first = build_prompt_book(backbone, PROMPTS, cache=tmp_path)
        assert counter.rows == 71  # all prompts and the empty one
        with counted(backbone.pipe.text_encoder) as counter:
            second = build_prompt_book(backbone, PROMPTS, cache=tmp_path)
        assert counter.rows == 0
        everything = torch.arange(70)
        for book in (first, second):
            assert same(book.take(everything), plain.take(everything))
            assert same(book.null_condition, plain.null_condition)
            assert book.groups == PROMPTS.groups

    def test_more_prompts_encode_only_what_is_new(
        self, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prompt_book, "SHARD_ROWS", 16)
        build_prompt_book(backbone, PromptList(PROMPTS.prompts[:40]), cache=tmp_path)
        with counted(backbone.pipe.text_encoder) as counter:
            book = build_prompt_book(backbone, PROMPTS, cache=tmp_path)
        assert counter.rows == 70 - 32  # two whole shards were there, and the empty prompt
        chosen = torch.tensor([69, 3, 3, 17, 40, 0])
        whole = build_prompt_book(backbone, PROMPTS)
        assert torch.allclose(book.take(chosen).sequence, whole.take(chosen).sequence, atol=1e-5)

    def test_another_encoder_or_length_is_another_cache(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        build_prompt_book(backbone, TWO, cache=tmp_path)
        weight = next(backbone.pipe.text_encoder.parameters())
        with changed(weight, 7.0), counted(backbone.pipe.text_encoder) as counter:
            build_prompt_book(backbone, TWO, cache=tmp_path)
        assert counter.rows == 3
        longer = wrap_pipeline(backbone.pipe, max_sequence_length=2)
        book = build_prompt_book(longer, TWO, cache=tmp_path)
        assert book.take(torch.tensor([0])).sequence.shape[1] == 10
        assert len(list(tmp_path.glob("embeddings-*/index.json"))) == 3

    def test_progress_ends_with_everything(
        self, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(prompt_book, "ENCODE_BATCH", 16)
        seen: list[tuple[int, int]] = []
        build_prompt_book(
            backbone, PROMPTS, on_progress=lambda done, total: seen.append((done, total))
        )
        assert seen == sorted(seen)
        assert (seen[0], seen[-1]) == ((16, 70), (70, 70))

    def test_a_pipeline_without_text_encoders_cannot_be_cached(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        parts = [("text_encoder", backbone.pipe.text_encoder)]
        parts.append(("text_encoder_2", backbone.pipe.text_encoder_2))
        backbone.pipe.register_modules(**{name: None for name, _ in parts})
        try:
            with pytest.raises(ConfigError, match="has no text encoder loaded, so its embeddings"):
                build_prompt_book(backbone, TWO, cache=tmp_path)
        finally:
            backbone.pipe.register_modules(**dict(parts))


class TestConditionShards:
    def parts(self) -> tuple[Condition, ...]:
        """Rows 0 to 5, of 2, 4 and 3 tokens."""
        lengths, rows = (2, 4, 3), iter(range(6))
        return tuple(
            Condition(
                torch.full((2, n, 5), 1.0) * torch.tensor([[[next(rows)]], [[next(rows)]]]),
                torch.randn(2, 3),
                torch.ones(2, n, dtype=torch.bool),
            )
            for n in lengths
        )

    def test_rows_are_those_of_one_padded_condition(self) -> None:
        parts = self.parts()
        shards, whole = ConditionShards(parts), joined(parts)
        assert len(shards) == len(whole) == 6
        index = torch.tensor([5, 0, 3, 3, 2])
        found, expected = shards.take(index), whole.take(index)
        assert same(found, expected)
        assert torch.equal(found.mask, expected.mask)  # pyright: ignore[reportArgumentType]
        assert found.mask is not None
        assert found.mask.sum(dim=1).tolist() == [3, 2, 4, 4, 4]
        assert torch.equal(found.sequence[:, 0, 0], index.float())

    def test_rows_are_padded_no_further_than_needed(self) -> None:
        shards = ConditionShards(self.parts())
        assert shards.take(torch.tensor([0, 5])).sequence.shape == (2, 3, 5)

    def test_padding_needs_a_mask(self) -> None:
        parts = [Condition(torch.zeros(1, n, 5)) for n in (2, 3)]
        with pytest.raises(ShapeError, match="of 2 and of 3 tokens, and this model takes no mask"):
            ConditionShards(tuple(parts))

    def test_rows_that_are_not_there(self) -> None:
        with pytest.raises(IndexError):
            ConditionShards(self.parts()).take(torch.tensor([6]))


def make_pictures(folder: Path, sizes: list[tuple[int, int]], caption: str) -> Path:
    """Noise pictures of (height, width), by name in this order."""
    folder.mkdir(exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


class TestPictures:
    AREA = 64 * 128

    def test_real_digits_from_files_decode_back_to_recognisable_digits(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        digits = load_digits()
        labels = digits.labels[:60]
        for number, (image, label) in enumerate(zip(digits.images, labels, strict=False)):
            Image.fromarray(image).save(tmp_path / f"{number:03}.png")
            (tmp_path / f"{number:03}.txt").write_text(prompt_for(int(label)))
        source = read_images(str(tmp_path))
        prompts = source.captions()
        assert sorted(prompts.prompts) == sorted(prompt_for(label) for label in range(10))
        latents = build_latent_book(backbone, source, prompts)
        assert (latents.shapes, latents.sizes) == (((16, 8, 8),), (60,))
        x0, prompt = latents.take(0, torch.arange(60))
        asked = [prompts.prompts[row] for row in prompt.tolist()]
        assert asked == [prompt_for(int(label)) for label in labels]
        scores = DigitsJudge().score(backbone.decode(x0).numpy(), labels)
        assert scores.accuracy > 0.95

    def test_every_picture_is_in_the_bucket_of_its_aspect(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        sizes = [(64, 128), (128, 64), (64, 64), (130, 70)]
        folder = make_pictures(tmp_path / "set", sizes, TWO.prompts[1])
        book = build_latent_book(backbone, str(folder), TWO, area_px=self.AREA)
        assert book.shapes == ((16, 8, 8), (16, 8, 16), (16, 16, 8))
        assert book.sizes == (1, 1, 2)
        assert book.buckets[2].prompt.tolist() == [1, 1]
        pixels = np.asarray(Image.open(folder / "0.png")).copy()
        expected = backbone.encode_images(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255.0)
        assert torch.allclose(book.buckets[1].latents, expected, atol=1e-5)

    def test_a_second_run_does_not_call_the_vae(self, backbone: Backbone, tmp_path: Path) -> None:
        folder = make_pictures(tmp_path / "set", [(64, 64)] * 3, TWO.prompts[0])
        cache = tmp_path / "cache"
        with counted(backbone.pipe.vae.encoder) as counter:
            first = build_latent_book(backbone, str(folder), TWO, cache=cache)
            assert counter.rows == 3
            second = build_latent_book(backbone, str(folder), TWO, cache=cache)
            assert counter.rows == 3
            (folder / "1.txt").write_text(TWO.prompts[1])  # captions are no part of latents
            third = build_latent_book(backbone, str(folder), TWO, cache=cache)
            assert counter.rows == 3
        assert torch.equal(first.buckets[0].latents, second.buckets[0].latents)
        assert third.buckets[0].prompt.tolist() == [0, 1, 0]

    def test_a_changed_picture_is_encoded_with_its_shard_only(
        self, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(picture_latents, "SHARD_ROWS", 2)
        folder = make_pictures(tmp_path / "set", [(64, 64)] * 5, TWO.prompts[0])
        cache = tmp_path / "cache"
        before = build_latent_book(backbone, str(folder), TWO, cache=cache)
        assert [len(part) for part in before.buckets[0].parts] == [2, 2, 1]
        Image.new("RGB", (64, 64)).save(folder / "4.png")
        os.utime(folder / "4.png", ns=(0, 0))
        with counted(backbone.pipe.vae.encoder) as counter:
            after = build_latent_book(backbone, str(folder), TWO, cache=cache)
        assert counter.rows == 1
        index = torch.tensor([3, 0, 3])
        assert torch.equal(before.take(0, index)[0], after.take(0, index)[0])
        assert torch.equal(after.take(0, index)[0], after.buckets[0].latents[index])

    def test_a_damaged_picture(
        self, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = make_pictures(tmp_path / "set", [(64, 64)] * 3, TWO.prompts[0])
        content = (folder / "1.png").read_bytes()
        (folder / "1.png").write_bytes(content[:2000])
        cache = tmp_path / "cache"
        with pytest.raises(ConfigError, match="1.png: cannot be read as a picture"):
            build_latent_book(backbone, str(folder), TWO, cache=cache)
        with caplog.at_level(logging.WARNING, "fewstep"):
            book = build_latent_book(backbone, str(folder), TWO, cache=cache, skip_bad=True)
        assert book.sizes == (2,)
        assert [record.message.partition(";")[0] for record in caplog.records] == [
            f"{folder}: 1 bad rows skipped"
        ]
        with pytest.raises(ConfigError, match="1.png: could not be decoded when it was cached"):
            build_latent_book(backbone, str(folder), TWO, cache=cache)

    def test_nothing_but_damaged_pictures(self, backbone: Backbone, tmp_path: Path) -> None:
        folder = make_pictures(tmp_path / "set", [(64, 64)], TWO.prompts[0])
        content = (folder / "0.png").read_bytes()
        (folder / "0.png").write_bytes(content[:2000])
        with pytest.raises(ConfigError, match="has no good pictures: all 1 are bad"):
            build_latent_book(backbone, str(folder), TWO, cache=tmp_path / "c", skip_bad=True)

    def test_a_caption_that_is_no_prompt(self, backbone: Backbone, tmp_path: Path) -> None:
        folder = make_pictures(tmp_path / "set", [(64, 64)] * 2, TWO.prompts[0])
        (folder / "1.txt").write_text("a horse")
        with pytest.raises(ConfigError, match='1.png: its caption "a horse" is not among the prom'):
            build_latent_book(backbone, str(folder), TWO)
        assert build_latent_book(backbone, str(folder), TWO, skip_bad=True).sizes == (1,)

    def test_small_pictures_are_warned_of(
        self, backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = make_pictures(tmp_path / "set", [(64, 64), (20, 20)], TWO.prompts[0])
        with caplog.at_level(logging.WARNING, "fewstep"):
            build_latent_book(backbone, str(folder), TWO)
        assert caplog.records[0].message.startswith("1 of 2 pictures are smaller than their bucket")

    def test_a_vae_that_overflows_is_told(self, backbone: Backbone, tmp_path: Path) -> None:
        folder = make_pictures(tmp_path / "set", [(64, 64)], TWO.prompts[0])
        weight = next(backbone.pipe.vae.encoder.parameters())
        with (
            changed(weight, float("nan")),
            pytest.raises(ConfigError, match="values that are not finite for .*0.png; load it in"),
        ):
            build_latent_book(backbone, str(folder), TWO)

    def test_progress_ends_with_everything(self, backbone: Backbone, tmp_path: Path) -> None:
        sizes = [(64, 128), (64, 64), (64, 64)]
        folder = make_pictures(tmp_path / "set", sizes, TWO.prompts[0])
        seen: list[tuple[int, int]] = []
        build_latent_book(
            backbone,
            str(folder),
            TWO,
            area_px=self.AREA,
            on_progress=lambda done, total: seen.append((done, total)),
        )
        assert seen == sorted(seen)
        assert seen[-1] == (3, 3)

    def test_the_prompts_of_pictures_without_a_prompts_file_are_their_captions(
        self, backbone: Backbone, tmp_path: Path
    ) -> None:
        folder = make_pictures(tmp_path / "set", [(64, 64)] * 2, "a handwritten nine")
        source = read_images(str(folder))
        assert isinstance(source, PictureList)
        book = build_prompt_book(backbone, source.captions())
        latents = build_latent_book(backbone, source, book)
        condition = book.take(latents.take(0, torch.tensor([1]))[1])
        assert same(condition, backbone.encode(["a handwritten nine"]))


class TestLatentSources:
    def write(self, path: Path, latents: Tensor, prompts: str) -> None:
        save_file({"latents": latents}, path, metadata={"prompts": prompts})

    def test_files_become_buckets_by_shape(self, backbone: Backbone, tmp_path: Path) -> None:
        first, second, wide = torch.randn(2, 16, 8, 8), torch.randn(1, 16, 8, 8), (1, 16, 8, 16)
        self.write(tmp_path / "a.safetensors", first, '["a handwritten two", "a handwritten one"]')
        self.write(tmp_path / "b.safetensors", torch.ones(wide).half(), '["a handwritten one"]')
        self.write(tmp_path / "c.safetensors", second, '["a handwritten two"]')
        book = build_latent_book(backbone, str(tmp_path), TWO)
        assert (book.shapes, book.sizes) == (((16, 8, 8), (16, 8, 16)), (3, 1))
        x0, prompt = book.take(0, torch.tensor([2, 0, 1]))
        assert torch.equal(x0, torch.cat([second, first]))
        assert prompt.tolist() == [1, 1, 0]
        x0, _ = book.take(1, torch.tensor([0]))
        assert x0.dtype == torch.float32
        assert torch.equal(x0, torch.ones(wide))

    def test_what_does_not_fit_the_model_is_told(self, backbone: Backbone, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        self.write(path, torch.zeros(1, 4, 8, 8), '["a handwritten two"]')
        with pytest.raises(ConfigError, match="latents of 4 channels, this model's have 16"):
            build_latent_book(backbone, str(path), TWO)
        self.write(path, torch.zeros(2, 16, 8, 8), '["a handwritten two", "a horse"]')
        with pytest.raises(ConfigError, match='row 2: its caption "a horse" is not among'):
            build_latent_book(backbone, str(path), TWO)
        assert build_latent_book(backbone, str(path), TWO, skip_bad=True).sizes == (1,)
        with pytest.raises(ConfigError, match="whose size is what it is; set area_px to 0"):
            build_latent_book(backbone, str(path), TWO, area_px=4096)

    def test_buckets_are_drawn_by_their_size(self) -> None:
        book = LatentBook(
            tuple(
                LatentBucket((torch.zeros(n, 1, 1, 1),), torch.zeros(n, dtype=torch.long))
                for n in (10, 30)
            )
        )
        generator = torch.Generator().manual_seed(0)
        drawn = [book.draw_bucket(generator) for _ in range(2000)]
        assert sum(drawn) == pytest.approx(1500, abs=80)  # 4 deviations


class TestDigits:
    def test_every_digit_has_a_prompt_that_asks_for_it(self, backbone: Backbone) -> None:
        digits = load_digits()
        some = Digits(digits.images[:100], digits.labels[:100])
        book = build_prompt_book(backbone, PROMPTS)
        latents = latents_of_digits(backbone, some, book)
        assert (latents.shapes, latents.sizes) == (((16, 8, 8),), (100,))
        rows = latents.buckets[0].prompt.tolist()
        assert [int(book.groups[row]) for row in rows] == some.labels.tolist()
        assert len(set(rows)) == 70  # each of the seven ways to ask, in turn
        first = Digits(some.images[:16], some.labels[:16])
        expected = encode_all(backbone.pipe.vae, first)
        assert torch.allclose(latents.take(0, torch.arange(16))[0], expected, atol=1e-5)

    @pytest.mark.slow
    def test_all_real_digits_survive_the_autoencoder(self, backbone: Backbone) -> None:
        latents = digits_latents(backbone, build_prompt_book(backbone, PROMPTS))
        assert latents.sizes == (1797,)
        parts = latents.buckets[0].latents.split(64)
        images = np.concatenate([backbone.decode(part).numpy() for part in parts])
        assert DigitsJudge().score(images, load_digits().labels).accuracy > 0.99

    def test_prompts_of_other_things_are_refused(self, backbone: Backbone) -> None:
        book = build_prompt_book(backbone, PromptList(("a one", "a cat"), ("1", "cat")))
        with pytest.raises(
            ConfigError, match="no prompt asks for the digits 0, 2, 3, 4, 5, 6, 7, 8"
        ):
            digits_latents(backbone, book)
