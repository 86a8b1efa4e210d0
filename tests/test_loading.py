"""Loading a stock pipeline: damaged indexes are one sentence, settings of the user's stay."""

from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from fewstep.loading import load_stock_pipeline, without_progress_bars

LOGS = (diffusers_logging, transformers_logging)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "names no pipeline class"),
        ('{"unet": [null, null]}', "names no pipeline class"),
    ],
)
def test_a_damaged_index_is_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(OSError, match=f"model_index.json {words}"):
        load_stock_pipeline(tmp_path)


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bars_are_as_the_user_left_them(enabled: bool) -> None:
    before = [log.is_progress_bar_enabled() for log in LOGS]
    try:
        for log in LOGS:
            log.enable_progress_bar() if enabled else log.disable_progress_bar()
        with without_progress_bars():
            assert not any(log.is_progress_bar_enabled() for log in LOGS)
        assert [log.is_progress_bar_enabled() for log in LOGS] == [enabled, enabled]
    finally:
        for log, was in zip(LOGS, before, strict=True):
            log.enable_progress_bar() if was else log.disable_progress_bar()
