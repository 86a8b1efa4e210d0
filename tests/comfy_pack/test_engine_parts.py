"""CLIP and VAE of an engine, its memory, and which exports and providers there are."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.comfy_nodes import engine_packages
from fewstep.comfy_nodes.engine_clip import EngineClip
from fewstep.comfy_nodes.engine_families import SERVED, in_comfyui, served
from fewstep.comfy_nodes.engine_folders import exports_under, state_of
from fewstep.comfy_nodes.engine_vae import EngineVae
from fewstep.errors import RuntimeSettingError
from fewstep.recipe import Base, Guidance
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.onnx_session import PROVIDERS
from tests.comfy_pack.engine_doubles import engine_of
from tests.tiny.recipes import flow_recipe, vp_recipe


def make_export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


def test_exports_are_listed_by_their_path_below_the_root(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    mine = make_export(first / "sd3")
    make_export(first / "sd3" / "inside")  # part of an export, not another one
    make_export(first / "flux" / "schnell")
    make_export(first / "a" / "b" / "c" / "too deep")
    make_export(second / "sd3")  # hidden by the first root's
    theirs = make_export(second / "sdxl")
    (first / "empty").mkdir()
    found = exports_under([first, second, tmp_path / "nowhere"])
    assert list(found) == ["flux/schnell", "sd3", "sdxl"]
    assert found["sd3"] == mine
    assert found["sdxl"] == theirs


def test_the_state_of_an_export_is_that_of_its_manifest(tmp_path: Path) -> None:
    folder = make_export(tmp_path / "sd3")
    before = state_of(folder)
    (folder / "manifest.json").write_text("{ }", encoding="utf-8")
    assert state_of(folder) != before
    assert state_of(tmp_path / "nowhere") == "missing"


def test_every_served_family_has_a_host() -> None:
    for family in SERVED:
        assert host_of(family).family == family


def test_what_cannot_be_sampled_is_refused_with_what_can() -> None:
    with pytest.raises(RuntimeSettingError) as refused:
        served("sana", flow_recipe("sana"), "tiny")
    assert str(refused.value).startswith("'tiny' holds a sana model, and this node runs SD 1.x and")
    x0 = vp_recipe("sd15")
    x0 = replace(x0, base=replace(x0.base, prediction="x0"))
    with pytest.raises(RuntimeSettingError, match="'tiny' predicts x0, and for SD 1.x and 2.x"):
        served("sd15", x0, "tiny")


def test_guidance_that_the_engine_tells_itself_is_not_left_to_comfyui() -> None:
    told = Guidance(mode="embedded", scale=4.0)
    assert in_comfyui(vp_recipe("sd15", guidance=told)).guidance == Guidance()
    assert in_comfyui(flow_recipe("flux", guidance=told)).guidance == told
    guided = Guidance(mode="cfg", scale=2.0)
    assert in_comfyui(vp_recipe("sd15", guidance=guided)).guidance == guided
    assert isinstance(in_comfyui(vp_recipe("sd15")).base, Base)


def test_providers_are_those_of_the_runtime() -> None:
    everything = {"auto", "openvino", "openvino-bf16", "tensorrt-native", *PROVIDERS}
    assert set(engine_packages.PROVIDERS) == everything


@pytest.mark.parametrize(
    ("provider", "missing", "command"),
    [
        ("auto", {"onnxruntime", "openvino"}, "-m pip install onnxruntime`"),
        ("cpu", {"onnxruntime"}, "-m pip install onnxruntime`"),
        ("cuda", {"onnxruntime"}, "-m pip install onnxruntime-gpu`"),
        ("openvino", {"openvino"}, "-m pip install openvino`"),
        ("tensorrt-native", {"tensorrt"}, "-m pip install tensorrt-cu13 cuda-bindings filelock`"),
        ("cpu", {"tokenizers"}, "-m pip install tokenizers`"),
    ],
)
def test_a_missing_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, provider: str, missing: set[str], command: str
) -> None:
    monkeypatch.setattr(engine_packages.sys, "executable", r"C:\ComfyUI\python_embeded\python.exe")
    there = lambda name: None if name in missing else object()  # noqa: E731
    monkeypatch.setattr(engine_packages, "find_spec", there)
    with pytest.raises(RuntimeSettingError) as refused:
        engine_packages.require(provider)
    assert rf'`"C:\ComfyUI\python_embeded\python.exe" {command}' in str(refused.value)


def test_auto_is_content_with_openvino_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    there = lambda name: None if name == "onnxruntime" else object()  # noqa: E731
    monkeypatch.setattr(engine_packages, "find_spec", there)
    engine_packages.require("auto")
    with pytest.raises(RuntimeSettingError, match="needs onnxruntime"):
        engine_packages.require("cpu")


def test_a_provider_that_was_not_built_in_is_named() -> None:
    engine_packages.require("cpu")
    absent = next(name for name in ("coreml", "directml") if name not in _built_in())
    with pytest.raises(RuntimeSettingError, match=f"has no {absent} provider, only"):
        engine_packages.require(absent)


def _built_in() -> tuple[str, ...]:
    from fewstep.runtime.onnx_session import available_providers

    return available_providers()


def test_weights_ask_for_gpu_memory_until_they_are_loaded() -> None:
    assert engine_of("sd15")[0].missing_bytes == 0
    engine, _ = engine_of("sd15", provider="cuda")
    assert engine.missing_bytes == 1010
    engine.session("unet")
    assert engine.missing_bytes == 0
    engine.release()
    assert engine.missing_bytes == 1010


def test_a_part_that_was_not_exported_is_named() -> None:
    with pytest.raises(RuntimeSettingError, match="'tiny' has no text_encoder_9"):
        engine_of("sd15")[0].session("text_encoder_9")


def test_latents_are_decoded_as_they_are_one_by_one() -> None:
    engine, loader = engine_of("sd15")
    latents = torch.linspace(-2.0, 2.0, 2 * 4 * 3 * 2).reshape(2, 4, 3, 2)
    found = EngineVae(engine).decode(latents)
    assert found.shape == (2, 24, 16, 3)
    assert (found.min(), found.max()) == (0.0, 1.0)
    runs = loader.sessions["vae_decoder/model.onnx"].calls
    assert [len(fed["latent_sample"]) for fed in runs] == [1, 1]
    np.testing.assert_array_equal(runs[1]["latent_sample"], latents[1:].numpy())
    expected = (latents[1, :3].mul(0.5) + 0.5).clamp(0, 1)
    torch.testing.assert_close(found[1, ::8, ::8].movedim(-1, 0), expected)


def test_pictures_are_cut_to_whole_latents_and_encoded_to_the_mean() -> None:
    engine, loader = engine_of("sd15")
    pictures = torch.rand(1, 19, 16, 4)
    vae = EngineVae(engine)
    assert vae.encode(pictures).shape == (1, 4, 2, 2)
    fed = loader.sessions["vae_encoder/model.onnx"].calls[0]["sample"]
    expected = 2.0 * pictures[:, 1:17, :, :3].movedim(-1, 1) - 1.0
    np.testing.assert_allclose(fed, expected.numpy(), atol=1e-6)
    assert vae.spacial_compression_decode() == vae.spacial_compression_encode() == 8
    assert vae.temporal_compression_decode() is None


def test_fields_of_several_encoders_must_say_the_same() -> None:
    clip = EngineClip(engine_of("sdxl")[0])
    tokens = clip.tokenize("a red cat")
    assert tokens == {"l": ["a red cat"], "g": ["a red cat"]}
    tokens["l"] = clip.tokenize("a blue dog")["l"]
    with pytest.raises(RuntimeSettingError, match="reads one text with all its encoders and got 2"):
        clip.encode_from_tokens_scheduled(tokens)


def test_conditioning_has_what_the_host_encodes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = engine_of("sdxl")
    asked: list[list[str]] = []

    def encode(prompts: list[str]) -> dict[str, np.ndarray]:
        asked.append(prompts)
        ones = np.ones((1, 5), np.float32)
        return {"encoder_hidden_states": np.ones((1, 3, 8), np.float16), "text_embeds": ones}

    monkeypatch.setattr(engine.host, "encode", encode)
    clip = EngineClip(engine).clone()
    tokens = {"l": [], "g": ["a (red:1.2) cat"]}  # "padding none" of CLIPTextEncodeSD3 empties one
    with caplog.at_level(logging.WARNING):
        [[states, more]] = clip.encode_from_tokens_scheduled(tokens, add_dict={"width": 64})
    assert asked == [["a (red:1.2) cat"]]
    assert "reads '(red:1.2)' as plain text" in caplog.text
    assert states.dtype == torch.float32
    assert more["pooled_output"].shape == (1, 5)
    assert more["width"] == 64
    states, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    assert pooled is not None
    assert clip.encode("").shape == states.shape
    assert asked[-1] == [""]


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda clip: clip.clip_layer(-2), '"CLIP Set Last Layer"'),
        (lambda clip: clip.cond_stage_model, "a LoRA"),
        (lambda clip: clip.add_patches({}), "a LoRA"),
        (lambda clip: clip.patcher, "a hook"),
        (lambda clip: clip.set_tokenizer_option("t5xxl_min_padding", 1), "the tokenizer option"),
    ],
)
def test_what_would_change_the_encoders_is_refused(act: object, what: str) -> None:
    with pytest.raises(RuntimeSettingError, match="weights of an engine are fixed") as refused:
        act(EngineClip(engine_of("sd15")[0]))  # pyright: ignore[reportCallIssue]
    assert str(refused.value).startswith(f"{what}")
