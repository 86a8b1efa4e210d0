"""save_adapter against stock diffusers and peft: what is written is what everybody applies."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from fewstep.adapters import (
    base_shapes_of_folder,
    check_coverage,
    inspect_adapter,
    read_header,
    save_adapter,
)
from fewstep.adapters.modelspec import usage_hint
from fewstep.errors import AdapterError
from fewstep.recipe import (
    Base,
    FewStepRecipe,
    Grid,
    Guidance,
    Lora,
    Sampler,
    Schedule,
)

FLOW = FewStepRecipe(
    base=Base(family="sd3", prediction="flow", schedule=Schedule(kind="flow", shift=1.0)),
    grids=(
        Grid(timesteps=(1000.0, 500.0), sigmas=(1.0, 0.5, 0.0)),
        Grid(timesteps=(1000.0, 750.0, 500.0, 250.0), sigmas=(1.0, 0.75, 0.5, 0.25, 0.0)),
    ),
    default_steps=4,
)
VP = FewStepRecipe(
    base=Base(
        family="sd15",
        prediction="epsilon",
        schedule=Schedule(
            kind="vp", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
    ),
    grids=(Grid(timesteps=(999.0,), sigmas=(0.99767, 0.0)),),
    default_steps=1,
)
RANK, ALPHA = 4, 8.0
RANK_PATTERN = {"proj_out": 2}
"""The last layer's name is also the tail of other modules' names: the hard case for PEFT."""


def transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).eval()


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    ).eval()


def run(model: torch.nn.Module) -> Tensor:
    """One forward pass on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 3, 16, generator=generator)
    with torch.no_grad():
        if isinstance(model, SD3Transformer2DModel):
            return model(
                hidden_states=sample,
                encoder_hidden_states=text,
                pooled_projections=text[:, 0],
                timestep=torch.full((2,), 500.0),
                return_dict=False,
            )[0]
        return model(sample, 500, encoder_hidden_states=text[..., :8], return_dict=False)[0]


def lora_of(model: torch.nn.Module, rank_pattern: dict[str, int]) -> dict[str, Tensor]:
    """Random LoRA weights, PEFT names, for attention, convolutions and `rank_pattern`'s modules."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in model.named_modules():
        wanted = name.rpartition(".")[2] in ("to_q", "to_k", "add_q_proj", "conv1", "conv_shortcut")
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        if not wanted and name not in rank_pattern:
            continue
        weight = module.weight
        rank = rank_pattern.get(name, RANK)
        ones = (1,) * (weight.ndim - 2)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, *ones, generator=generator)
        tensors[f"{name}.lora_A.weight"] = 0.3 * down
        tensors[f"{name}.lora_B.weight"] = 0.3 * up
    assert len(tensors) >= 8
    return tensors


def add_by_hand(
    model: torch.nn.Module,
    tensors: dict[str, Tensor],
    scales: dict[str, float],
) -> None:
    """weight += scale * B A, for linear layers and convolutions."""
    with torch.no_grad():
        for name in {key.split(".lora_")[0] for key in tensors}:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            weight += scales[name] * delta


def stock_pipeline(
    model: torch.nn.Module,
) -> StableDiffusion3Pipeline | StableDiffusionPipeline:
    """A pipeline with nothing but its denoiser: enough to load a LoRA."""
    absent: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if isinstance(model, SD3Transformer2DModel):
        absent |= dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
        scheduler = FlowMatchEulerDiscreteScheduler()
        return StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, **absent)
    assert isinstance(model, UNet2DConditionModel)
    absent |= dict.fromkeys(("scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(unet=model, requires_safety_checker=False, **absent)


Kind = Literal["transformer", "unet"]
CASES = [
    pytest.param("transformer", ALPHA, {}, 1.0, id="sd3"),
    pytest.param("transformer", 3.0, {"proj_out": 5.0}, 1.0, id="sd3, alpha pattern"),
    pytest.param("transformer", 4.0, {}, 0.125, id="sd3, recipe scale"),
    pytest.param("unet", ALPHA, {}, 1.0, id="unet"),
]


def build(kind: Kind) -> tuple[torch.nn.Module, FewStepRecipe, dict[str, int]]:
    if kind == "transformer":
        return transformer(), FLOW, RANK_PATTERN
    return unet(), VP, {"mid_block.attentions.0.proj_in": 2, "conv_out": 3}


@pytest.mark.parametrize(("kind", "alpha", "alpha_pattern", "scale"), CASES)
@pytest.mark.parametrize("loader", ["pipeline", "model", "peft"])
def test_every_loader_applies_scale_alpha_over_rank(
    tmp_path: Path,
    kind: Kind,
    alpha: float,
    alpha_pattern: dict[str, float],
    scale: float,
    loader: str,
) -> None:
    model, recipe, rank_pattern = build(kind)
    tensors = lora_of(model, rank_pattern)
    path = save_adapter(
        tmp_path / "a.safetensors",
        tensors,
        recipe=dataclasses.replace(recipe, lora=Lora(scale=scale)),
        rank=RANK,
        alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        component=kind,
        title="test",
    )
    plain = run(model)
    by_hand, _, _ = build(kind)
    modules = {key.split(".lora_")[0] for key in tensors}
    scales = {m: scale * alpha_pattern.get(m, alpha) / rank_pattern.get(m, RANK) for m in modules}
    add_by_hand(by_hand, tensors, scales)
    if loader == "pipeline":
        stock_pipeline(model).load_lora_weights(str(path), adapter_name="few")
    elif loader == "model":
        assert isinstance(model, SD3Transformer2DModel | UNet2DConditionModel)
        model.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix=kind)
    else:
        load_with_peft(model, path, kind)
    expected = run(by_hand)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def load_with_peft(model: torch.nn.Module, path: Path, component: str) -> None:
    """PEFT alone: LoraConfig from the file's metadata, weights by PEFT names."""
    stored = json.loads(read_header(path).metadata["lora_adapter_metadata"])
    config = LoraConfig(**{k.removeprefix(f"{component}."): v for k, v in stored.items()})
    inject_adapter_in_model(config, model)
    weights = {k.removeprefix(f"{component}."): v for k, v in load_file(path).items()}
    outcome = set_peft_model_state_dict(model, weights)
    assert not outcome.unexpected_keys
    assert not [key for key in outcome.missing_keys if "lora_" in key]


def save(path: Path, **changes: object) -> Path:
    """A one-module adapter; keyword arguments replace the usual ones."""
    settings: dict[str, Any] = {
        "tensors": {
            "blocks.0.to_q.lora_A.weight": torch.arange(8.0).reshape(2, 4),
            "blocks.0.to_q.lora_B.weight": torch.ones(3, 2),
        },
        "recipe": FLOW,
        "rank": 2,
        "alpha": 1.0,
        "title": "Digits, 4 steps",
        **changes,
    }
    return save_adapter(path, **settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.safetensors"


def test_metadata_is_minimal_and_says_what_is_in_the_tensors(path: Path) -> None:
    metadata = read_header(save(path)).metadata
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "transformer.r": 2,
        "transformer.lora_alpha": 2,
        "transformer.target_modules": ["blocks.0.to_q"],
    }
    assert {k for k in metadata if not k.startswith("modelspec.")} == {
        "format",
        "lora_adapter_metadata",
        "fewstep.recipe",
    }
    up = load_file(path)["transformer.blocks.0.to_q.lora_B.weight"]
    assert up.tolist() == [[0.5, 0.5]] * 3


def test_different_ranks_are_bound_to_whole_names(path: Path) -> None:
    tensors = {
        f"{name}.lora_{part}.weight": torch.ones(shape)
        for name, rank in (("proj_out", 1), ("blocks.0.proj_out", 2))
        for part, shape in (("A", (rank, 4)), ("B", (4, rank)))
    }
    save(path, tensors=tensors, rank_pattern={"proj_out": 1}, component="unet")
    config = json.loads(read_header(path).metadata["lora_adapter_metadata"])
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"] == {"^proj_out": 1}
    coverage = check_coverage(
        read_header(path), {"proj_out.weight": (4, 4), "blocks.0.proj_out.weight": (4, 4)}
    )
    assert coverage.alphas == {"proj_out": 1.0, "blocks.0.proj_out": 2.0}


def test_the_recipe_survives_with_its_scale_baked(path: Path) -> None:
    recipe = dataclasses.replace(FLOW, lora=Lora(scale=0.5))
    stored = read_header(save(path, recipe=recipe)).recipe()
    assert stored == dataclasses.replace(FLOW, lora=Lora(scale=1.0, alpha="baked"))


def test_people_find_what_they_look_for(path: Path) -> None:
    save(
        path,
        description="Four steps.",
        resolution=(64, 48),
        date="2026-01-02",
        thumbnail_png=b"\x89PNG",
        metadata={"run": "7"},
    )
    metadata = read_header(path).metadata
    data = path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :]
    assert {k.removeprefix("modelspec."): v for k, v in metadata.items() if "modelspec" in k} == {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-3/lora",
        "implementation": "diffusers",
        "title": "Digits, 4 steps",
        "description": "Four steps.",
        "date": "2026-01-02",
        "resolution": "64x48",
        "hash_sha256": f"0x{hashlib.sha256(data).hexdigest()}",
        "tags": "few-step, distilled, 2-step, 4-step",
        "usage_hint": "4 steps (or 2), guidance off, Euler; see fewstep.recipe",
        "thumbnail": "data:image/png;base64,iVBORw==",
    }
    assert metadata["run"] == "7"
    assert "modelspec.prediction_type" not in metadata  # the standard has no word for flow
    assert read_header(save(path, recipe=VP)).metadata["modelspec.prediction_type"] == "epsilon"


def test_usage_hint_in_plain_words() -> None:
    cfg = Guidance(mode="cfg", scale=1.5, negative_prompt="works")
    tcd = dataclasses.replace(VP, sampler=Sampler(stochasticity=0.3), guidance=cfg)
    assert usage_hint(tcd) == "1 step, guidance 1.5, TCD gamma 0.3"
    lcm = dataclasses.replace(VP, sampler=Sampler(stochasticity=1.0), steps="any")
    assert usage_hint(lcm) == (
        "1 step (any count works), guidance off, LCM (fresh noise each step)"
    )
    assert usage_hint(VP) == "1 step, guidance off, DDIM"


def test_equal_input_gives_equal_bytes_in_any_order(path: Path) -> None:
    model = transformer()
    tensors = lora_of(model, {})
    extra = {"run": "7", "author": "me"}
    first = save(path, tensors=tensors, rank=RANK, metadata=extra).read_bytes()
    backward, extra = dict(reversed(tensors.items())), dict(reversed(extra.items()))
    assert save(path, tensors=backward, rank=RANK, metadata=extra).read_bytes() == first
    assert (int.from_bytes(first[:8], "little")) % 8 == 0  # aligned data


@pytest.mark.parametrize(
    ("dtype", "name", "kind"),
    [
        ("fp32", "F32", torch.float32),
        ("fp16", "F16", torch.float16),
        ("bf16", "BF16", torch.bfloat16),
    ],
)
def test_stored_precision(path: Path, dtype: str, name: str, kind: torch.dtype) -> None:
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensors = {"m.lora_A.weight": values.T.contiguous().T, "m.lora_B.weight": torch.ones(3, 2)}
    save(path, tensors=tensors, dtype=dtype, alpha=3.0)
    stored = load_file(path)
    assert torch.equal(stored["transformer.m.lora_A.weight"], values.float().to(kind))
    assert torch.equal(stored["transformer.m.lora_B.weight"], torch.full((3, 2), 1.5).to(kind))
    assert inspect_adapter(path).dtypes == (name,)


def test_inspection_of_a_saved_adapter_has_nothing_to_warn_of(tmp_path: Path, path: Path) -> None:
    model = transformer()
    model.save_pretrained(tmp_path / "base" / "transformer", max_shard_size="20KB")
    assert list((tmp_path / "base" / "transformer").glob("*.index.json"))
    shapes = base_shapes_of_folder(tmp_path / "base", "transformer")
    assert shapes == {k: tuple(v.shape) for k, v in model.state_dict().items() if k in shapes}
    assert len(shapes) >= len(list(model.parameters()))
    tensors = lora_of(model, {})
    report = inspect_adapter(save(path, tensors=tensors, rank=RANK), tmp_path / "base")
    assert report.warnings == ()
    assert report.coverage is not None
    assert report.coverage.matched == len(tensors) / 2
    assert [(row.rank, row.alpha) for row in report.ranks] == [(RANK, RANK)]
    assert (report.family, report.naming) == ("sd3", ("diffusers/PEFT",))


ONE = torch.ones(2, 2)
REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "nothing": ({"tensors": {}}, "got no tensors"),
    "half": ({"tensors": {"m.lora_A.weight": ONE}}, "m has no .lora_B.weight; give both"),
    "kohya names": ({"tensors": {"m.lora_down.weight": ONE}}, "use PEFT names"),
    "prefix": ({"tensors": {"transformer.m.lora_A.weight": ONE}}, "has a prefix"),
    "rank": ({"rank": 3}, "wanted (3, in) and (out, 3)"),
    "rank pattern": ({"rank_pattern": {"to_q": 2}}, "names 'to_q', which is not a module"),
    "alpha pattern": ({"alpha_pattern": {"x": 2.0}}, "names 'x', which is not a module"),
    "not a number": ({"alpha": float("nan")}, "not finite in fp32"),
    "fp16 overflow": ({"alpha": 1e6, "dtype": "fp16"}, "not finite in fp16"),
    "component": ({"component": "denoiser"}, "component is 'denoiser'; use one of"),
    "taken key": ({"metadata": {"fewstep.recipe": "x"}}, "is written by fewstep"),
    "taken family": ({"metadata": {"modelspec.title": "x"}}, "is written by fewstep"),
    "number": ({"metadata": {"x": 1}}, "must be text, got int"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_is_not_a_lora_is_not_written(path: Path, kind: str) -> None:
    changes, message = REFUSALS[kind]
    with pytest.raises(AdapterError) as caught:
        save(path, **changes)
    assert message in str(caught.value)
    assert not path.exists()


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"end the name in \.safetensors"):
        save(tmp_path / "adapter.bin")


def test_a_failure_before_the_rename_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(path).read_bytes()

    def killed(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        assert Path(source).stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(path, alpha=2.0)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
