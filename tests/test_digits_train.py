"""`python -m fewstep.digits.train` goes through all four parts and leaves loadable weights."""

import json
from pathlib import Path

import pytest

from fewstep.digits.train import main


@pytest.mark.slow
def test_a_short_training_leaves_every_part_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        word
        for part in ("classifier", "autoencoder", "sd3", "sd15")
        for word in (f"--{part}-steps", "9")
    ]
    command = ["--out", str(tmp_path), *steps]
    assert main(command) == 0
    for name in ("classifier", "vae", "sd3", "sd15"):
        figures = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert figures["steps"] == 9
        assert (tmp_path / f"{name}.png").stat().st_size > 500
    for kind, denoiser in (("sd3", "transformer"), ("sd15", "unet")):
        assert (tmp_path / kind / "model_index.json").is_file()
        assert (tmp_path / kind / "tokenizer" / "vocab.json").is_file()
        assert list((tmp_path / kind / denoiser).glob("*.safetensors"))
        assert not (tmp_path / kind / "vae").exists()
    assert main(command) == 0
    assert capsys.readouterr().err.count("already trained, kept") == 4
