"""Prompts as the stock pipelines' tokenizers cut and pad them; conditions of several lengths."""

import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from fewstep.runtime.hosts.conditions import joined
from fewstep.runtime.hosts.packing import pack, unpack
from fewstep.runtime.tokens import PromptTokenizer
from tests.trainer import tiny_text

PROMPTS = ["a red cat", "two big blue dogs run", ""]
BEFORE, AFTER = "user run ", " two"


@pytest.fixture
def both(tmp_path: Path) -> tuple[Any, PromptTokenizer]:
    """transformers' tokenizer, and the runtime's on its files."""
    stock = tiny_text.tokenizer()
    stock.save_pretrained(tmp_path)
    return stock, PromptTokenizer(tmp_path)


def test_ids_and_mask_are_those_of_transformers(both: tuple[Any, PromptTokenizer]) -> None:
    stock, ours = both
    texts = [f"{BEFORE}{prompt}{AFTER}" for prompt in PROMPTS]
    wanted = stock(texts, padding="max_length", max_length=20, return_tensors="np")
    ids, mask = ours.encode_with_mask(PROMPTS, 20, before=BEFORE, after=AFTER)
    np.testing.assert_array_equal(ids, wanted.input_ids)
    np.testing.assert_array_equal(mask, wanted.attention_mask)
    wanted = stock(texts, padding=True, return_tensors="np")
    ids, mask = ours.encode_longest(PROMPTS, 20, before=BEFORE, after=AFTER)
    np.testing.assert_array_equal(ids, wanted.input_ids)
    np.testing.assert_array_equal(mask, wanted.attention_mask)
    assert ours.count(BEFORE) == len(stock.encode(BEFORE))


@pytest.mark.parametrize("length", [6, 8])
def test_a_prompt_that_is_too_long_is_cut_as_in_transformers(
    both: tuple[Any, PromptTokenizer], length: int
) -> None:
    stock, ours = both
    text = f"{BEFORE}{PROMPTS[1]}{AFTER}"
    wanted = stock([text], truncation=True, max_length=length, return_tensors="np").input_ids
    with pytest.warns(UserWarning, match=f"this model reads {length}; cut was") as found:
        ids, _ = ours.encode_with_mask([PROMPTS[1]], length, before=BEFORE, after=AFTER)
    np.testing.assert_array_equal(ids, wanted)
    kept = stock.decode(wanted[0], skip_special_tokens=True)
    lost = str(found[0].message).rpartition("cut was: ")[2].strip("'")
    assert "run" in lost
    assert "user" not in lost  # the prompt's own end, not the template's
    assert len(kept) < len(text)
    assert found[0].filename == __file__  # the warning points at whoever called


def test_a_template_that_is_cut_behind_the_prompt_is_no_warning(
    both: tuple[Any, PromptTokenizer], recwarn: pytest.WarningsRecorder
) -> None:
    _, ours = both
    whole = ours.count(f"{BEFORE}{PROMPTS[0]}{AFTER}")
    ours.encode_with_mask([PROMPTS[0]], whole - 1, before=BEFORE, after=AFTER)
    assert not list(recwarn)


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads take turns a thousand times as often, and no warning is an error in them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_threads")
def test_threads_cut_their_own_prompts_alone(both: tuple[Any, PromptTokenizer]) -> None:
    _, ours = both
    texts = ["two big blue dogs run " * count for count in range(1, 120)]
    lengths = [6 + index % 5 for index in range(len(texts))]
    wanted = [ours.encode([text], length) for text, length in zip(texts, lengths, strict=True)]
    failed: list[object] = []

    def work() -> None:
        for text, length, row in zip(texts, lengths, wanted, strict=True):
            try:
                np.testing.assert_array_equal(ours.encode([text], length), row)
                assert ours.count(text) > length or text == texts[0]
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_conditions_of_other_lengths_are_filled_up_with_zeros() -> None:
    long = {"states": np.ones((2, 5, 3), np.float32), "mask": np.ones((2, 5), np.int64)}
    short = {"states": np.ones((1, 2, 3), np.float32), "mask": np.ones((1, 2), np.int64)}
    found = joined([short, long])
    assert found["states"].shape == (3, 5, 3)
    np.testing.assert_array_equal(found["mask"][0], [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(found["states"][0].any(axis=-1), found["mask"][0])
    np.testing.assert_array_equal(found["states"][1:], long["states"])


def test_packing_is_diffusers_and_undone() -> None:
    latents = np.random.default_rng(0).standard_normal((2, 3, 6, 4)).astype(np.float32)
    stock = FluxPipeline._pack_latents(torch.from_numpy(latents), 2, 3, 6, 4)
    np.testing.assert_array_equal(pack(latents), stock.numpy())
    np.testing.assert_array_equal(unpack(pack(latents), 6, 4), latents)
