"""Facts about cached shards: made once, checked always, never half there."""

import json
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.digits.models import build_tokenizer
from fewstep.errors import ConfigError
from fewstep.trainer.data.cache import ShardCache
from fewstep.trainer.data.digests import (
    digest_of,
    module_digest,
    tensor_digest,
    tokenizer_digest,
)

MADE_BY = {"encoder": "abc", "length": 8}


class Maker:
    """Makes a shard and counts how often."""

    def __init__(self, value: float = 1.0) -> None:
        self.calls = 0
        self.value = value

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return {
            "rows": torch.full((3, 4), self.value, dtype=torch.bfloat16),
            "mask": torch.tensor([True, False]),
            "index": torch.arange(5),
        }


def open_cache(root: Path, made_by: dict[str, object] | None = None) -> ShardCache:
    return ShardCache(root, "embeddings", made_by or MADE_BY)


def shard_files(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.safetensors"))


class TestShards:
    def test_a_shard_is_made_once_and_read_ever_after(self, tmp_path: Path) -> None:
        maker = Maker()
        made = open_cache(tmp_path).shard(["a", "b"], maker)
        read = open_cache(tmp_path).shard(["a", "b"], maker)
        assert maker.calls == 1
        for name, tensor in maker().items():
            assert torch.equal(made[name], tensor)
            assert torch.equal(read[name], tensor)
            assert read[name].dtype == tensor.dtype

    def test_other_content_is_another_shard(self, tmp_path: Path) -> None:
        maker, cache = Maker(), open_cache(tmp_path)
        cache.shard(["a", "b"], maker)
        cache.shard(["b", "a"], maker)
        assert maker.calls == 2
        assert len(shard_files(cache)) == 2

    def test_another_encoder_has_a_folder_of_its_own(self, tmp_path: Path) -> None:
        maker = Maker()
        first, second = open_cache(tmp_path), open_cache(tmp_path, {**MADE_BY, "length": 9})
        first.shard("a", maker)
        second.shard("a", maker)
        assert maker.calls == 2
        assert first.folder != second.folder
        index = json.loads((second.folder / "index.json").read_text())
        assert index["made_by"] == {"encoder": "abc", "length": 9}

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
    def test_tensors_are_mapped_not_read(self, tmp_path: Path) -> None:
        cache = open_cache(tmp_path)
        tensors = cache.shard("a", Maker())
        assert str(shard_files(cache)[0]) in Path("/proc/self/maps").read_text()
        assert len(tensors["rows"]) == 3

    def test_processes_that_ask_for_one_shard_make_it_once(self, tmp_path: Path) -> None:
        maker = Maker()

        def make() -> dict[str, Tensor]:
            time.sleep(0.2)  # long enough for the others to ask, too
            return maker()

        def ask() -> None:
            found.append(open_cache(tmp_path).shard("a", make)["rows"])

        found: list[Tensor] = []
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert maker.calls == 1
        assert [tuple(rows.shape) for rows in found] == [(3, 4)] * 3


class TestInterruption:
    def test_only_what_is_missing_is_made(self, tmp_path: Path) -> None:
        def killed() -> dict[str, Tensor]:
            raise KeyboardInterrupt

        first, second = Maker(), Maker()
        cache = open_cache(tmp_path)
        cache.shard("a", first)
        with pytest.raises(KeyboardInterrupt):
            cache.shard("b", killed)
        again = open_cache(tmp_path)
        again.shard("a", first)
        again.shard("b", second)
        assert (first.calls, second.calls) == (1, 1)

    def test_a_half_written_file_is_never_taken_and_goes_away(self, tmp_path: Path) -> None:
        cache, maker = open_cache(tmp_path), Maker()
        cache.shard("a", maker)
        (whole,) = shard_files(cache)
        half = whole.read_bytes()[:50]
        whole.unlink()
        leftover = whole.with_name(f".{whole.name}.partial")
        leftover.write_bytes(half)  # as `kill -9` in the middle of writing leaves it
        assert torch.equal(open_cache(tmp_path).shard("a", maker)["index"], torch.arange(5))
        assert maker.calls == 2
        assert not leftover.exists()

    def test_a_shard_that_was_not_listed_yet_is_made_anew(self, tmp_path: Path) -> None:
        cache, maker = open_cache(tmp_path), Maker()
        cache.shard("a", maker)
        (cache.folder / "index.json").unlink()  # killed between the two renames
        open_cache(tmp_path).shard("a", maker)
        assert maker.calls == 2


class TestDamage:
    def check(self, root: Path, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            open_cache(root).shard("a", Maker())
        assert str(caught.value) == message

    @pytest.mark.parametrize("position", [3, 200, -1])
    def test_a_flipped_bit_is_found_and_only_its_shard_made_anew(
        self, position: int, tmp_path: Path
    ) -> None:
        cache, other = open_cache(tmp_path), Maker()
        cache.shard("a", Maker())
        (path,) = shard_files(cache)
        cache.shard("b", other)
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        self.check(
            tmp_path,
            f"{path} is damaged (its sha256 is not the one in index.json); delete this file and "
            "run again: it alone is made anew",
        )
        path.unlink()
        again = Maker()
        open_cache(tmp_path).shard("a", again)
        open_cache(tmp_path).shard("b", other)
        assert (again.calls, other.calls) == (1, 1)

    def test_a_shard_of_another_cache(self, tmp_path: Path) -> None:
        mine, theirs = open_cache(tmp_path), open_cache(tmp_path / "other", {"encoder": "x"})
        mine.shard("a", Maker())
        theirs.shard("a", Maker(2.0))
        (path,), (foreign,) = shard_files(mine), shard_files(theirs)
        shutil.copy(foreign, path)
        index = json.loads((mine.folder / "index.json").read_text())
        checksums = json.loads((theirs.folder / "index.json").read_text())["shards"]
        index["shards"] = {path.name: checksums[foreign.name]}
        (mine.folder / "index.json").write_text(json.dumps(index))
        self.check(
            tmp_path,
            f"{path} is of another cache (its key differs); delete this file and run again: it "
            "alone is made anew",
        )

    def test_an_index_of_another_cache(self, tmp_path: Path) -> None:
        mine, theirs = open_cache(tmp_path), open_cache(tmp_path, {"encoder": "x"})
        theirs.shard("a", Maker())
        shutil.copy(theirs.folder / "index.json", mine.folder / "index.json")
        self.check(
            tmp_path,
            f"{mine.folder / 'index.json'} belongs to other weights, settings or releases; delete "
            f"the folder {mine.folder} and run again: it is made anew",
        )

    @pytest.mark.parametrize("text", ["{", "[]", '{"format": "fewstep.cache/1"}'])
    def test_a_damaged_index(self, text: str, tmp_path: Path) -> None:
        cache = open_cache(tmp_path)
        (cache.folder / "index.json").write_text(text)
        with pytest.raises(ConfigError, match="index.json is damaged .* delete the folder"):
            open_cache(tmp_path)

    def test_a_listed_file_that_is_no_safetensors(self, tmp_path: Path) -> None:
        from fewstep.trainer.data.digests import file_digest

        cache = open_cache(tmp_path)
        cache.shard("a", Maker())
        (path,) = shard_files(cache)
        path.write_bytes(b"no")
        index = json.loads((cache.folder / "index.json").read_text())
        index["shards"][path.name] = file_digest(path)
        (cache.folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigError, match="cannot be read .* delete this file and run again"):
            open_cache(tmp_path).shard("a", Maker())


class TestDigests:
    def test_of_plain_data(self) -> None:
        assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
        assert digest_of({"a": 1}) != digest_of({"a": 2})

    def test_of_a_network_sees_every_bit_and_nothing_else(self) -> None:
        torch.manual_seed(0)
        one = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        other.load_state_dict(one.state_dict())
        assert module_digest(one) == module_digest(other.train().requires_grad_(False))
        assert module_digest(one) != module_digest(other.half())
        with torch.no_grad():
            other.float()
            other.load_state_dict(one.state_dict())
            weight = next(other.parameters())
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        assert module_digest(one) != module_digest(other)

    def test_of_a_tensor_sees_its_shape(self) -> None:
        assert tensor_digest(torch.zeros(2, 3)) != tensor_digest(torch.zeros(3, 2))
        assert tensor_digest(torch.zeros(0)) != tensor_digest(torch.zeros(0, dtype=torch.bfloat16))

    def test_of_a_tokenizer_does_not_change_when_it_is_used(self) -> None:
        tokenizer, fresh = build_tokenizer(), build_tokenizer()
        before = tokenizer_digest(tokenizer)
        tokenizer(["a seven"], padding="max_length", max_length=5, truncation=True)
        assert tokenizer_digest(tokenizer) == before == tokenizer_digest(fresh)
        fresh.add_tokens(["new"])
        assert tokenizer_digest(fresh) != before
