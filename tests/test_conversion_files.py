"""`fewstep convert`: files in, files out, smaller ones, and LoRA from full weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.adapters import read_header
from fewstep.adapters.conversion.convert import convert_file
from fewstep.adapters.conversion.ranking import total_error, truncated, truncated_product
from fewstep.cli.main import main
from fewstep.errors import AdapterError
from fewstep.recipe import METADATA_KEY
from tests.conversion_checks import adapted, deltas, in_diffusers, read, write, write_diffusers
from tests.conversion_families import ALL, FLUX, IN_COMFYUI, SD15, WAN, ConversionFamily
from tests.tiny.recipes import flow_recipe


def base_of(folder: Path, family: ConversionFamily) -> Path:
    """A pipeline folder with just the denoiser."""
    model: Any = family.build()
    model.save_pretrained(folder / "base" / family.component)
    return folder / "base"


def source_of(folder: Path, family: ConversionFamily, **metadata: str) -> Path:
    tensors, alphas = family.lora()
    return write_diffusers(folder / "source.safetensors", family, tensors, alphas, metadata)


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_without_a_base_the_names_alone_give_the_same_file(
    family: ConversionFamily, tmp_path: Path
) -> None:
    """From kohya's flattened, fused names back to diffusers', no base anywhere."""
    tensors, alphas = family.lora()
    source = source_of(tmp_path, family)
    flavour = "comfyui" if family in IN_COMFYUI else "kohya"
    there = convert_file(source, tmp_path / "there.safetensors", flavour)
    back = convert_file(there.path, tmp_path / "back.safetensors", "diffusers")
    assert (there.family, back.family) == (family.name, family.name)
    assert (back.modules, back.is_checked) == (len(alphas), False)
    adapter = read(back.path, family)
    assert adapter.alphas == alphas
    assert all(torch.equal(adapter.tensors[name], values) for name, values in tensors.items())


def test_a_base_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = base_of(tmp_path, FLUX)
    target = tmp_path / "x.safetensors"
    with pytest.raises(AdapterError, match="none of 27 modules fit this base"):
        convert_file(source_of(tmp_path, WAN), target, "kohya", base=base)
    assert not target.exists()
    assert convert_file(source_of(tmp_path, FLUX), target, "kohya", base=base).is_checked


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    source = source_of(tmp_path, FLUX)
    files = [tmp_path / f"{i}.safetensors" for i in (1, 2)]
    for file in files:
        convert_file(source, file, "kohya")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_baked_alpha_is_rank_and_the_deltas_are_the_same(tmp_path: Path) -> None:
    recipe = flow_recipe("flux").to_json()
    source = source_of(tmp_path, FLUX, **{METADATA_KEY: recipe})
    convert_file(source, tmp_path / "baked.safetensors", "diffusers", is_baked=True)
    adapter = read(tmp_path / "baked.safetensors", FLUX)
    assert adapter.alphas == {module: float(rank) for module, rank in adapter.ranks.items()}
    before = deltas(*FLUX.lora())
    after = deltas(adapter.tensors, adapter.alphas)
    assert all(torch.equal(after[module], delta) for module, delta in before.items())
    written = read_header(tmp_path / "baked.safetensors").recipe()
    assert written is not None
    assert written.lora.alpha == "baked"


def test_a_rank_that_is_enough_changes_nothing(tmp_path: Path) -> None:
    tensors, alphas = FLUX.lora()
    result = convert_file(
        source_of(tmp_path, FLUX), tmp_path / "a.safetensors", "diffusers", rank=4
    )
    adapter = read(result.path, FLUX)
    assert total_error(result.errors) == 0.0
    assert adapter.alphas == alphas
    assert all(torch.equal(adapter.tensors[name], values) for name, values in tensors.items())


def test_the_error_of_fewer_ranks_is_that_of_the_best_ones(tmp_path: Path) -> None:
    """Against the singular values of the whole product (Eckart and Young)."""
    tensors, alphas = FLUX.lora()
    result = convert_file(
        source_of(tmp_path, FLUX), tmp_path / "a.safetensors", "diffusers", rank=2
    )
    full, tails, total = deltas(tensors, alphas), {}, 0.0
    for module, delta in full.items():
        values = torch.linalg.svdvals(delta.double())
        tails[module] = float(values[2:].norm())
        total += float(values.norm()) ** 2
    errors = {error.module: error.error for error in result.errors}
    assert errors == pytest.approx(tails, abs=1e-5)
    wanted = sum(tail**2 for tail in tails.values()) ** 0.5 / total**0.5
    assert total_error(result.errors) == pytest.approx(wanted, rel=1e-5)
    adapter = read(result.path, FLUX)
    assert set(adapter.ranks.values()) == {2}
    after = deltas(adapter.tensors, adapter.alphas)
    for module, delta in full.items():
        assert float((after[module] - delta).norm()) == pytest.approx(errors[module], abs=1e-5)


def test_re_ranking_again_costs_nothing(tmp_path: Path) -> None:
    first = convert_file(source_of(tmp_path, SD15), tmp_path / "a.safetensors", "kohya", rank=2)
    second = convert_file(first.path, tmp_path / "b.safetensors", "kohya", rank=2)
    assert total_error(first.errors) > 0.01
    assert total_error(second.errors) == 0.0
    assert load_file(second.path).keys() == load_file(first.path).keys()


def test_the_randomised_decomposition_is_as_good_as_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(400, 300, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(500, 300, generator=generator)).Q
    values = 0.97 ** torch.arange(300)
    delta = left * values @ right.T
    up, down = truncated(delta, 16)  # 4 * (16 + 32) < 400: the randomised way
    best = float(values[16:].norm())
    assert float((delta - up @ down).norm()) == pytest.approx(best, rel=1e-3)
    assert torch.equal(truncated(delta, 16)[0], up)  # the same numbers every time
    up, down = truncated_product(left * values, right.T, 16)
    assert float((delta - up @ down).norm()) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("family", [FLUX, SD15, WAN], ids=lambda family: family.name)
def test_full_weights_become_a_lora_of_the_difference(
    family: ConversionFamily, tmp_path: Path
) -> None:
    base = base_of(tmp_path, family)
    student: Any = family.build().eval()
    torch.manual_seed(1)
    for name, values in student.named_parameters():
        if name.endswith(".weight") and values.ndim >= 2:
            flat = values.data.flatten(1)
            delta = torch.randn(flat.shape[0], 2) @ torch.randn(2, flat.shape[1]) * 0.05
            values.data += delta.reshape(values.shape)
        elif name.endswith(".bias") and family is not SD15 and "norm" not in name:
            values.data += 0.01 * torch.randn_like(values)
    student.save_pretrained(tmp_path / "student")
    result = convert_file(
        tmp_path / "student", tmp_path / "a.safetensors", "diffusers", base=base, rank=2
    )
    assert total_error(result.errors) < 1e-5
    assert result.left_out == {}
    model = in_diffusers(result.path, family)
    assert adapted(model) >= set(family.modules())
    wanted = family.output(student)
    assert (family.output(model) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_biases_stay_out_where_peft_cannot_hold_them_and_are_counted(tmp_path: Path) -> None:
    """A UNet's attention has no biases, and peft has them on all adapted layers or on none."""
    base, student = base_of(tmp_path, SD15), SD15.build()
    for values in student.parameters():
        values.data *= 1.5
    save_file(
        {n: v.contiguous() for n, v in student.state_dict().items()}, tmp_path / "s.safetensors"
    )
    arguments: Any = {"base": base, "rank": 1}
    result = convert_file(
        tmp_path / "s.safetensors", tmp_path / "a.safetensors", "diffusers", **arguments
    )
    assert result.left_out["conv_in.bias"] == pytest.approx(0.5)
    assert result.left_out["conv_norm_out.weight"] == pytest.approx(0.5)
    assert result.deltas == 0
    result = convert_file(
        tmp_path / "s.safetensors", tmp_path / "b.safetensors", "kohya", **arguments
    )
    assert "conv_in.bias" not in result.left_out
    assert "lora_unet_conv_in.diff_b" in load_file(result.path)


def test_native_full_weights_are_understood_and_vectors_are_named(tmp_path: Path) -> None:
    """Wan's own names, as ComfyUI keeps checkpoints; a norm changed that no LoRA can change."""
    base = base_of(tmp_path, WAN)
    weights = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    names = {
        "blocks.0.attn1.to_q.weight": "model.diffusion_model.blocks.0.self_attn.q.weight",
        "blocks.1.attn1.norm_q.weight": "model.diffusion_model.blocks.1.self_attn.norm_q.weight",
        "blocks.1.ffn.net.2.bias": "model.diffusion_model.blocks.1.ffn.2.bias",
    }
    student = {native: weights[name] * 1.5 for name, native in names.items()}
    save_file(student, tmp_path / "student.safetensors")
    result = convert_file(
        tmp_path / "student.safetensors", tmp_path / "a.safetensors", "kohya", base=base, rank=24
    )
    assert result.modules == 1
    assert result.left_out == pytest.approx(
        {"blocks.1.attn1.norm_q.weight": 0.5, "blocks.1.ffn.net.2.bias": 0.5}
    )
    (delta,) = deltas(*_factors(result.path)).values()
    assert torch.allclose(delta, weights["blocks.0.attn1.to_q.weight"] * 0.5, atol=1e-5)


def _factors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    adapter = read(path, WAN)
    return adapter.tensors, adapter.alphas


def test_whole_deltas_become_lora_at_a_rank(tmp_path: Path) -> None:
    delta = torch.randn(32, 3) @ torch.randn(3, 24)
    save_file({"diffusion_model.blocks.0.ffn.0.diff": delta}, tmp_path / "diff.safetensors")
    base = base_of(tmp_path, WAN)
    target = tmp_path / "a.safetensors"
    result = convert_file(tmp_path / "diff.safetensors", target, "diffusers", base=base, rank=3)
    assert (result.modules, result.deltas) == (1, 0)
    assert total_error(result.errors) < 1e-5
    assert torch.allclose(deltas(*_factors(target))["blocks.0.ffn.net.0.proj"], delta, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank is 0, wanted at least 1"),
        (["--family", "dall-e"], "layer names of family 'dall-e' are not known"),
        (["--base", "nowhere"], "there is no such folder"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = source_of(tmp_path, FLUX), tmp_path / "x.safetensors"
    status = main(["convert", str(source), str(target), "--format", "kohya", *arguments])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert not target.exists()


def test_full_weights_without_a_base_are_refused(tmp_path: Path) -> None:
    base_of(tmp_path, WAN)
    student = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(AdapterError, match="holds full weights, not an adapter; give --base"):
        convert_file(student, tmp_path / "x.safetensors", "diffusers")


def test_equal_full_weights_are_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path, WAN)
    with pytest.raises(AdapterError, match="equal to the base in every matrix"):
        convert_file(base, tmp_path / "x.safetensors", "diffusers", base=base, rank=4)


def test_the_verb_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = source_of(tmp_path, FLUX), tmp_path / "x.safetensors"
    base = base_of(tmp_path, FLUX)
    common = ["convert", str(source), str(target), "--format", "comfyui", "--base", str(base)]
    assert main([*common, "--rank", "2"]) == 0
    text = capsys.readouterr().out
    assert "every layer fits the base" in text
    assert "worst" in text
    assert main([*common, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["modules"], report["checked_against_base"]) == (50, True)
    assert read_header(target).tensors


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    assert capsys.readouterr().out.count("fewstep convert ") >= 5


def test_pickles_of_plain_tensors_are_read(tmp_path: Path) -> None:
    tensors, alphas = FLUX.lora()
    path = write_diffusers(tmp_path / "s.safetensors", FLUX, tensors, alphas)
    kohya = load_file(write(tmp_path / "k.safetensors", FLUX, read(path, FLUX), "comfyui"))
    torch.save(kohya, tmp_path / "k.pt")
    convert_file(tmp_path / "k.pt", tmp_path / "x.safetensors", "diffusers")
    adapter = read(tmp_path / "x.safetensors", FLUX)
    assert all(torch.equal(adapter.tensors[name], values) for name, values in tensors.items())


@pytest.mark.parametrize("flavour", ["diffusers", "comfyui", "kohya"])
def test_a_recipe_goes_into_the_file_and_its_scale_into_the_weights(
    flavour: Any, tmp_path: Path
) -> None:
    source, target = source_of(tmp_path, FLUX), tmp_path / "hyper.safetensors"
    argv = ["convert", str(source), str(target), "--format", flavour, "--bake-scale"]
    with pytest.warns(UserWarning, match="unverified"):
        assert main([*argv, "--recipe", "zoo:hyper-flux1-dev-8steps-lora"]) == 0
    written = read_header(target).recipe()
    assert written is not None
    assert (written.default_steps, written.lora.scale) == (8, 1.0)
    adapter = read(target, FLUX)
    after = deltas(adapter.tensors, adapter.alphas)
    assert all(torch.equal(after[name], 0.125 * d) for name, d in deltas(*FLUX.lora()).items())


def test_a_scale_that_nothing_says_is_not_baked(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    with pytest.raises(AdapterError, match="carries no recipe, so the scale to bake"):
        convert_file(source_of(tmp_path, FLUX), target, "kohya", is_scale_baked=True)
    assert not target.exists()
