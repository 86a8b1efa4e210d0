"""The shipped digits weights: complete, small, accurate, loadable by stock classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from fewstep.digits.autoencoder import encode_all
from fewstep.digits.classifier import accuracy
from fewstep.digits.data import Digits, balanced_prompts, load_digits
from fewstep.digits.draw import picture_seeds
from fewstep.digits.judge import CLASSIFIER_FILE, DigitsJudge, load_classifier
from fewstep.digits.teacher_sampler import load_teacher, teacher_images
from fewstep.digits.weight_files import read_autoencoder
from fewstep.digits.weights import WEIGHTS, teacher_folder, weights_checksum
from fewstep.errors import ConfigError
from fewstep.loading import load_stock_pipeline


def test_all_weights_together_are_under_16_mb() -> None:
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*") if f.is_file()) < 16e6


def test_the_classifier_reads_digits_it_has_never_seen() -> None:
    model = load_classifier(CLASSIFIER_FILE)
    assert accuracy(model, load_digits().held_out()) >= 0.97


def test_the_autoencoder_gives_pictures_back() -> None:
    digits = load_digits()
    few = Digits(digits.images[:20], digits.labels[:20])
    vae = read_autoencoder(WEIGHTS / "vae")
    latents = encode_all(vae, few)
    assert latents.shape == (20, 16, 8, 8)
    assert 0.7 < latents.std() < 1.3
    with torch.no_grad():
        decoded = (vae.decoder(latents).clamp(-1, 1) + 1.0) * 127.5
    error = decoded.permute(0, 2, 3, 1).numpy() - few.images
    assert np.sqrt(np.square(error).mean()) < 8.0


@pytest.mark.parametrize(
    ("kind", "pipeline"), [("sd3", StableDiffusion3Pipeline), ("sd15", StableDiffusionPipeline)]
)
def test_a_teacher_folder_is_a_stock_pipeline(
    kind: str, pipeline: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    folder = teacher_folder(kind)
    assert folder.is_relative_to(tmp_path)
    assert teacher_folder(kind) == folder
    assert type(load_stock_pipeline(folder)) is pipeline


@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_a_teacher_draws_what_it_is_asked_for(kind: str) -> None:
    prompts, labels = balanced_prompts(60)
    drawn = teacher_images(
        load_teacher(teacher_folder(kind)), prompts, picture_seeds(1, 60), num_steps=10,
        guidance_scale=1.5,
    )  # fmt: skip
    assert DigitsJudge().score(drawn.images, labels).accuracy > 0.85


def test_an_unknown_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="use sd3 or sd15"):
        teacher_folder("sdxl")


def test_the_checksum_is_of_names_and_bytes() -> None:
    assert len(weights_checksum()) == 64
