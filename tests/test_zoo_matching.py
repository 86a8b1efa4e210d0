"""Which entry a file or a base is taken for, and what is only said."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.adapters import AdapterHeader, read_header
from fewstep.errors import AdapterError, RecipeError, RecipeNotFoundError
from fewstep.recipe_resolution import read_recipe, recipe_sources, resolve_recipe
from fewstep.zoo import ZooEntry, ZooFile, entry, likely_entries, match_adapter, match_base
from fewstep.zoo.digests import file_sha256, fingerprint, head_digest
from fewstep.zoo.matching import is_distinctive
from tests.tiny_pipelines import flow_recipe

DMD2 = "dmd2_sdxl_4step_lora_fp16.safetensors"
SDXL_QUERY = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
FLUX_QUERY = "transformer.single_transformer_blocks.0.attn.to_q"


def lora(
    path: Path,
    module: str = SDXL_QUERY,
    *,
    seed: int = 0,
    rank: int = 4,
    width: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> AdapterHeader:
    """A LoRA of one module, written to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{module}.lora_A.weight": torch.randn(rank, width, generator=generator).to(dtype),
        f"{module}.lora_B.weight": torch.randn(64, rank, generator=generator).to(dtype),
    }
    save_file(tensors, path)
    return read_header(path)


def listed(**file: str) -> tuple[ZooEntry, ...]:
    """A zoo of one entry, whose file nothing else would match."""
    alone = ZooFile(repo="nobody/nothing", filename="nothing.safetensors", **file)
    return (dataclasses.replace(entry("dmd2-sdxl-4step-lora"), files=(alone,)),)


def found(header: AdapterHeader) -> tuple[str, str] | None:
    match = match_adapter(header)
    return None if match is None else (match.entry.name, match.how)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (
            "models--ByteDance--Hyper-SD/snapshots/abc/Hyper-SDXL-4steps-lora.safetensors",
            "hyper-sdxl-4steps-lora",
        ),
        ("bytedance/hyper-sd/Hyper-SDXL-8steps-lora.safetensors", "hyper-sdxl-8steps-lora"),
        (
            "models--h1t--TCD-SDXL-LoRA/snapshots/abc/pytorch_lora_weights.safetensors",
            "tcd-sdxl-lora",
        ),
        (
            "wangfuyun/PCM_Weights/pcm_sdxl_normalcfg_4step_converted.safetensors",
            "pcm-sdxl-normalcfg-4step",
        ),
        ("models--wangfuyun--AnimateLCM/snapshots/0/sd15_lora_beta.safetensors", "animatelcm"),
        (
            "Kijai/WanVideo_comfy/Lightx2v/"
            "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors",
            "lightx2v-wan2.1-t2v-14b-step-distill",
        ),
    ],
)
def test_the_repository_and_the_file_name_are_certain(
    place: str, name: str, tmp_path: Path
) -> None:
    assert found(lora(tmp_path / place, rank=3)) == (name, "repository")


@pytest.mark.parametrize("half", ["T2V", "I2V"])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_equal_file_names_in_two_folders_of_a_repository_are_told_apart(
    half: str, expert: str, tmp_path: Path
) -> None:
    folder = tmp_path / "models--lightx2v--Wan2.2-Lightning/snapshots/0"
    place = folder / f"Wan2.2-{half}-A14B-4steps-lora-rank64-Seko-V1"
    match = match_adapter(lora(place / f"{expert}_noise_model.safetensors"))
    assert match is not None
    assert match.entry.name == f"wan2.2-lightning-{half.lower()}-a14b"
    assert match.file.expert == f"{expert}_noise"
    loose = lora(folder / f"{expert}_noise_model.safetensors")
    assert match_adapter(loose) is None  # which of the two it is, nothing says


def test_a_style_lora_in_the_folder_of_a_checkpoint_is_not_that_checkpoint(tmp_path: Path) -> None:
    assert found(lora(tmp_path / "stabilityai/sdxl-turbo/my_style.safetensors")) is None


def test_a_distinctive_name_is_taken_where_the_family_fits(tmp_path: Path) -> None:
    assert found(lora(tmp_path / DMD2)) == ("dmd2-sdxl-4step-lora", "file name")
    assert found(lora(tmp_path / "flux" / DMD2, FLUX_QUERY, width=64)) is None


@pytest.mark.parametrize(
    ("name", "says_something"),
    [
        (DMD2, True),
        ("Hyper-FLUX.1-dev-8steps-lora.safetensors", True),
        ("wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors", True),
        ("pytorch_lora_weights.safetensors", False),
        ("diffusion_pytorch_model.fp16.safetensors", False),
        ("adapter_model.safetensors", False),
        ("high_noise_model.safetensors", False),
        ("sd15_lora_beta.safetensors", False),
        ("sdxl_4steps_lora_rank64.safetensors", False),
        (" 4steps .safetensors", False),
    ],
)
def test_what_a_file_name_says(name: str, says_something: bool) -> None:
    assert is_distinctive(name) is says_something


def test_a_name_that_fits_a_pattern_of_stars_only_is_nothing(tmp_path: Path) -> None:
    assert found(lora(tmp_path / "amazing_4steps_thing.safetensors")) is None


def test_sha256_is_certain_whatever_the_name(tmp_path: Path) -> None:
    header = lora(tmp_path / "renamed.safetensors")
    known = listed(sha256=file_sha256(header.path))
    match = match_adapter(header, known)
    assert match is not None
    assert match.how == "sha256"
    assert match_adapter(lora(tmp_path / "other.safetensors", seed=1), known) is None


def test_the_fingerprint_is_names_and_shapes_not_numbers_or_dtype(tmp_path: Path) -> None:
    header = lora(tmp_path / "a.safetensors")
    same = lora(tmp_path / "b.safetensors", seed=9, dtype=torch.bfloat16)
    assert fingerprint(same) == fingerprint(header)
    assert fingerprint(lora(tmp_path / "c.safetensors", rank=8)) != fingerprint(header)
    assert fingerprint(lora(tmp_path / "d.safetensors", "unet.x")) != fingerprint(header)


def test_the_fingerprint_decides_only_with_the_first_bytes(tmp_path: Path) -> None:
    header = lora(tmp_path / "renamed.safetensors")
    style = lora(tmp_path / "style.safetensors", seed=3)  # same rank, same targets
    known = listed(fingerprint=fingerprint(header), head=head_digest(header))
    match = match_adapter(header, known)
    assert match is not None
    assert match.how == "fingerprint"
    assert match_adapter(style, known) is None
    assert [e.name for e in likely_entries(style, known=known)] == ["dmd2-sdxl-4step-lora"]
    alone = listed(fingerprint=fingerprint(header))
    assert match_adapter(header, alone) is None


def test_a_file_that_has_gone_is_one_sentence(tmp_path: Path) -> None:
    header = lora(tmp_path / "a.safetensors")
    header.path.unlink()
    for digest in (head_digest, lambda gone: file_sha256(gone.path)):
        with pytest.raises(AdapterError, match="cannot be read"):
            digest(header)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("stabilityai/sdxl-turbo", "sdxl-turbo"),
        ("StabilityAI/SDXL-Turbo", "sdxl-turbo"),
        ("/cache/models--Tongyi-MAI--Z-Image-Turbo/snapshots/abc", "z-image-turbo"),
        ("/models/black-forest-labs/FLUX.1-schnell", "flux1-schnell"),
        ("stabilityai/stable-diffusion-xl-base-1.0", None),
        ("sdxl-turbo", None),
        ("ByteDance/Hyper-SD", None),
    ],
)
def test_a_base_is_known_by_its_hub_name(base: str, name: str | None) -> None:
    match = match_base(base)
    assert (None if match is None else match.entry.name) == name


def test_a_base_of_the_zoo_brings_its_recipe() -> None:
    resolved = resolve_recipe(recipe_sources(base="Tongyi-MAI/Z-Image-Turbo"))
    assert resolved.recipe == entry("z-image-turbo").recipe
    assert resolved.source == "zoo:z-image-turbo (found by repository)"


def test_the_zoo_is_asked_last_and_the_adapter_before_the_base(tmp_path: Path) -> None:
    header = lora(tmp_path / "ByteDance/Hyper-SD/Hyper-SDXL-4steps-lora.safetensors")
    own = flow_recipe("sd3", (1000.0, 100.0))
    both = {"adapter": header, "base": "stabilityai/sdxl-turbo"}
    assert resolve_recipe(recipe_sources(**both, installed=own)).recipe == own
    resolved = resolve_recipe(recipe_sources(**both))
    assert resolved.source == "zoo:hyper-sdxl-4steps-lora (found by repository)"


def test_a_file_name_alone_is_applied_with_a_warning(tmp_path: Path) -> None:
    sources = recipe_sources(adapter=lora(tmp_path / DMD2))
    with pytest.warns(UserWarning, match="by its file name alone; pass recipe='zoo:dmd2-sdxl-4s"):
        resolved = resolve_recipe(sources)
    assert resolved.recipe == entry("dmd2-sdxl-4step-lora").recipe


@pytest.mark.parametrize(
    "copy", ["DMD2-SDXL-4step-LoRA.safetensors", "dmd2_sdxl_4step_lora_fp16_pruned.safetensors"]
)
def test_a_similar_name_is_only_named(copy: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeNotFoundError, match="it looks like .*zoo:dmd2-sdxl-4step-lora"):
        resolve_recipe(recipe_sources(adapter=lora(tmp_path / copy)))


def test_a_similar_name_of_another_family_is_not_named(tmp_path: Path) -> None:
    header = lora(tmp_path / "DMD2-SDXL-4step-LoRA.safetensors", FLUX_QUERY, width=64)
    with pytest.raises(RecipeNotFoundError, match="pass recipe=, or put"):
        resolve_recipe(recipe_sources(adapter=header))


def test_a_copied_base_folder_is_only_named(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeNotFoundError, match="it looks like zoo:z-image-turbo; if it is, pass"
    ):
        resolve_recipe(recipe_sources(base=tmp_path / "z-image-turbo"))


def test_the_argument_may_name_an_entry() -> None:
    resolved = resolve_recipe(recipe_sources(argument="zoo:flux1-schnell"))
    assert resolved.recipe == entry("flux1-schnell").recipe == read_recipe("zoo:flux1-schnell")
    assert resolved.source == "zoo:flux1-schnell (the recipe argument)"
    with pytest.raises(
        RecipeError, match="the zoo has no entry 'flux1-schnel'; did you mean flux1"
    ):
        resolve_recipe(recipe_sources(argument="zoo:flux1-schnel"))


@pytest.mark.parametrize(
    ("name", "how"), [("sd-turbo", "from memory"), ("flux1-turbo-alpha", "by third parties only")]
)
def test_unverified_entries_say_so_with_a_link(name: str, how: str) -> None:
    link = entry(name).sources[0]
    with pytest.warns(UserWarning, match=f"zoo:{name} is unverified, .*{how}; compare .*{link}"):
        resolve_recipe(recipe_sources(argument=f"zoo:{name}"))


def test_an_entry_that_is_not_supported_is_refused_however_it_was_found() -> None:
    for sources in (
        recipe_sources(argument="zoo:anyflow-wan2.1-14b"),
        recipe_sources(base="nvidia/AnyFlow-Wan2.1-14B-Diffusers"),
    ):
        with pytest.raises(RecipeError, match="is not supported: its network takes a target time"):
            resolve_recipe(sources)


@pytest.mark.parametrize(
    "base",
    [
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "Lykon/dreamshaper-7",
        "stabilityai/stable-diffusion-3.5-large",
        "/cache/models--black-forest-labs--FLUX.1-dev/snapshots/0",
        "Tongyi-MAI/Z-Image",
        "Qwen/Qwen-Image",
    ],
)
def test_a_plain_base_looks_like_no_checkpoint(base: str) -> None:
    assert likely_entries(None, base) == ()
