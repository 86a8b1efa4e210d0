"""How the digits weights are stored: diffusers folders in float16, the autoencoder kept once."""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.loading import load_stock_pipeline


def write_autoencoder(model: AutoencoderTiny, folder: Path) -> None:
    """Save in float16, leaving `model` as it was."""
    half = copy.deepcopy(model).half()
    half.save_pretrained(folder)
    _forget_origin(folder)


def read_autoencoder(folder: Path) -> AutoencoderTiny:
    """Load in float32, ready to encode."""
    return AutoencoderTiny.from_pretrained(folder, dtype=torch.float32).eval()


def read_text_encoder(folder: Path) -> CLIPTextModelWithProjection:
    """The first text encoder of an SD3 teacher's folder, in float32."""
    return CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32)


def write_teacher(pipe: StableDiffusion3Pipeline | StableDiffusionPipeline, folder: Path) -> None:
    """Save a teacher's pipeline folder in float16, without the shared autoencoder."""
    with tempfile.TemporaryDirectory() as temporary:
        pipe.save_pretrained(temporary)
        half = load_stock_pipeline(temporary, dtype=torch.float16)
    half.save_pretrained(folder)
    shutil.rmtree(folder / "vae")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = half.components.get(name)
        if isinstance(tokenizer, CLIPTokenizer):
            _write_slow_files(tokenizer, folder / name)
    _forget_origin(folder)


def _forget_origin(folder: Path) -> None:
    """Drop the temporary folder that diffusers notes as the model's origin."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_slow_files(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json, for readers older than transformers 5."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
