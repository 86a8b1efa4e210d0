"""Experts: a graph each, whose weights are those of FewStepPipeline's expert and no one else's."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from onnx import numpy_helper
from PIL import Image
from torch import Tensor

from fewstep.digits.weights import teacher_folder
from fewstep.errors import ExportError
from fewstep.export.__main__ import main
from fewstep.export.checking.limits import is_within
from fewstep.export.experts import shared_experts
from fewstep.export.families.registry import family_of
from fewstep.export.merging import load_merged
from fewstep.export.quantizing.distilling import RATE, distil
from fewstep.export.quantizing.plan import Plan
from fewstep.export.quantizing.quantized_folder import chosen_components
from fewstep.export.quantizing.schemes import Int4
from fewstep.export.quantizing.skipping import parse_skips
from fewstep.loading import load_stock_pipeline
from fewstep.pipeline import FewStepPipeline
from fewstep.recipe import Expert, FewStepRecipe
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.few_step_runtime import FewStepRuntime
from fewstep.runtime.fused_runtime import FusedRuntime
from fewstep.runtime.hosts.registry import host_of
from fewstep.runtime.manifest import read_manifest
from fewstep.runtime.onnx_session import OnnxLoader
from tests.digits_exports import PROMPTS
from tests.expert_files import deltas_of, expert_folder
from tests.export.expert_exports import (
    LAYERS,
    expert_adapters,
    exported_experts,
)
from tests.tiny_pipelines import WAN22
from tests.trainer import tiny_text

NETWORK = "transformer"
STOCHASTICITIES = pytest.mark.parametrize("stochasticity", [0.0, 1.0])


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    """Weights of the network without any adapter."""
    return dict(load_stock_pipeline(teacher_folder("sd3")).components[NETWORK].state_dict())


def merged_by_hand(base: dict[str, Tensor], expert: str) -> dict[str, Tensor]:
    """No code of the product is in this arithmetic."""
    file = expert_adapters() / f"{expert}_model.safetensors"
    return {**base, **{k: base[k] + d for k, d in deltas_of(file, NETWORK)[NETWORK].items()}}


def runtime_of(folder: Path, recipe: FewStepRecipe | None = None, **manifest: Any) -> Any:
    opened = ExportFolder.open(folder)
    changed = replace(opened.manifest, **manifest)
    opened = replace(opened, manifest=changed, recipe=recipe or opened.recipe)
    loader = OnnxLoader(folder, changed.files, has_cache=False, threads=1)
    return FewStepRuntime(opened, loader, host_of("sd3"))


def furthest(one: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of two sets of pictures, of 255."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_experts_are_merged_one_at_a_time_and_taken_out_to_the_bit(
    precision: Any, base: dict[str, Tensor]
) -> None:
    merged = load_merged(teacher_folder("sd3"), expert_adapters(), None, precision)
    assert 0.0 < merged.merge_error < 1e-5
    network = merged.pipe.components[NETWORK]
    dtype = torch.float16 if precision == "fp16" else torch.float32
    seen = []
    for part in merged.parts():
        if not part.name.startswith(NETWORK):
            continue
        seen.append(part.name)
        expected = merged_by_hand(base, tuple(LAYERS)[len(seen) - 1])
        found = network.state_dict()
        assert part.dtype == dtype
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name], wanted.to(dtype), rtol=1e-3, atol=1e-6)
    assert seen == [NETWORK, f"{NETWORK}_2"]
    assert all(torch.equal(value, base[name]) for name, value in network.state_dict().items())


def test_each_expert_is_a_graph_of_its_own(base: dict[str, Tensor]) -> None:
    folder = exported_experts(0.0).folder
    manifest = read_manifest(folder)
    assert manifest.experts == (NETWORK, f"{NETWORK}_2")
    for graph, expert in zip(manifest.experts, LAYERS, strict=True):
        model = onnx.load(folder / graph / "model.onnx")
        held = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, wanted in merged_by_hand(base, expert).items():
            if f"model.{name}::T" in held:
                found = numpy_helper.to_array(held[f"model.{name}::T"]).T
                np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-6)
        assert sum(name.endswith("::T") for name in held) > 20


@STOCHASTICITIES
def test_runtime_and_fused_graph_draw_the_pipelines_pictures(stochasticity: float) -> None:
    made = exported_experts(stochasticity)
    wanted = made.pictures(prompt=PROMPTS, seed=5)
    found = runtime_of(made.folder)(PROMPTS, seed=5).pixels
    fused = FusedRuntime.load(made.folder, has_cache=False)(PROMPTS, seed=5).pixels
    assert furthest(found, wanted) <= 1
    assert furthest(fused, wanted) <= 1
    assert wanted.std() > 10  # pictures, not a grey card


def test_other_step_counts_and_sizes_have_their_experts() -> None:
    made = exported_experts(0.0)
    wanted = made.pictures(prompt=PROMPTS[0], seed=2, num_inference_steps=2, height=64, width=96)
    found = runtime_of(made.folder)(PROMPTS[0], seed=2, steps=2, size=(64, 96)).pixels
    assert furthest(found, wanted) <= 1


def test_image_to_image_starts_with_the_expert_of_its_level() -> None:
    made = exported_experts(1.0)
    start = Image.fromarray(made.pictures(prompt=PROMPTS[0], seed=1)[0])
    pipe: Any = FewStepPipeline.wrap(StableDiffusion3Img2ImgPipeline(**made.pipe.components))
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt=PROMPTS[1], image=start, strength=0.5, seed=9).images[0]
    runtime, levels = runtime_of(made.folder), []
    found = runtime(
        PROMPTS[1], image=start, strength=0.5, seed=9, callback=lambda e: levels.append(e.index)
    )
    assert len(levels) == 2  # both are the second expert's
    assert furthest(found.pixels[0], np.asarray(image)) <= 1


def test_experts_that_change_places_draw_another_picture() -> None:
    """What the tests above allow is far below what a wrong expert changes."""
    folder = exported_experts(0.0).folder
    right = runtime_of(folder)(PROMPTS, seed=5).pixels
    for wrong in ((f"{NETWORK}_2", NETWORK), (NETWORK, NETWORK), (f"{NETWORK}_2",) * 2):
        assert furthest(runtime_of(folder, experts=wrong)(PROMPTS, seed=5).pixels, right) > 20


def test_the_fused_graph_keeps_what_experts_share_once() -> None:
    folder = exported_experts(0.0).folder
    graphs = read_manifest(folder).graphs
    sizes = {name: _bytes(folder / graph.file) for name, graph in graphs.items()}
    parts = sum(size for name, size in sizes.items() if name not in ("fused", "vae_encoder"))
    assert sizes["fused"] < 1.02 * parts
    assert sizes["fused"] < parts - 0.8 * sizes[NETWORK]  # the experts change few of its weights
    model = onnx.load(folder / graphs["fused"].file, load_external_data=False)
    names = {tensor.name for tensor in model.graph.initializer}
    second = {name for name in names if name.startswith(f"{NETWORK}_2.")}
    changed = {layer for layers in LAYERS.values() for layer in layers}
    assert {name.split(".")[-2] for name in second} == changed
    assert all(name.replace(f"{NETWORK}_2.", f"{NETWORK}.") in names for name in second)


def _bytes(file: Path) -> int:
    return sum(path.stat().st_size for path in file.parent.glob("model.onnx*"))


def test_experts_are_quantized_together() -> None:
    folder = ExportFolder.open(exported_experts(0.0).folder)
    assert chosen_components(folder, ()) == (NETWORK, f"{NETWORK}_2")


def test_each_expert_is_distilled_in_its_turn(base: dict[str, Tensor]) -> None:
    folder = ExportFolder.open(exported_experts(0.0).folder)
    merged = load_merged(teacher_folder("sd3"), expert_adapters(), None)
    names = chosen_components(folder, ())
    plan = Plan(Int4(), names, parse_skips([]), tuple(PROMPTS[:2]), threads=1)
    made = distil(folder, merged, plan, steps=10, progress=lambda _: None)
    assert tuple(made.weights) == names
    assert made.after < made.before
    for expert, name in zip(LAYERS, names, strict=True):
        wanted = merged_by_hand(base, expert)
        for key, value in made.weights[name].items():
            start = wanted[key.removeprefix("model.")].numpy()
            # Adam moves a weight by its rate a step: ten steps from this expert, not the other
            np.testing.assert_allclose(value, start, rtol=0, atol=10 * RATE)
    held = merged.pipe.components[NETWORK].state_dict()
    assert all(torch.equal(value, base[key]) for key, value in held.items())


def test_networks_of_which_some_are_shared_are_refused() -> None:
    thirds = ((1.0, 0.7), (0.7, 0.3), (0.3, 0.0))
    networks = ("transformer", "transformer", "transformer_2")
    experts = tuple(
        Expert(adapter=f"e{i}", sigma_high=high, sigma_low=low, component=network)
        for i, ((high, low), network) in enumerate(zip(thirds, networks, strict=True))
    )
    pipe = SimpleNamespace(recipe=SimpleNamespace(experts=experts), adapters=())
    with pytest.raises(ExportError, match="share one network of several"):
        shared_experts(pipe, family_of("WanPipeline"))


def test_experts_of_separate_networks_are_merged_into_their_own(tmp_path: Path) -> None:
    pipe: Any = WAN22.build()
    pipe.register_modules(text_encoder=tiny_text.t5(16, multilingual=True))
    pipe.save_pretrained(tmp_path / "base")
    adapters, _ = expert_folder(WAN22, tmp_path / "adapters", own_networks=True)
    merged = load_merged(tmp_path / "base", adapters, None)
    assert merged.experts == ()
    assert merged.expert_graphs == ("transformer", "transformer_2")
    assert 0.0 < merged.merge_error < 1e-5
    for name, label in (("transformer", "high"), ("transformer_2", "low")):
        before, after = (p.components[name].state_dict() for p in (WAN22.build(), merged.pipe))
        deltas = deltas_of(adapters / f"{label}_noise_model.safetensors", name)[name]
        for key, value in after.items():
            wanted = before[key] + deltas[key] if key in deltas else before[key]
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_command_publishes_experts_that_pass_the_gate(precision: str, tmp_path: Path) -> None:
    argv = ["onnx", "--base", "digits-sd3", "--adapter", str(expert_adapters()), "--fused"]
    out = tmp_path / "out"
    # --force: on a busy machine the speed of an export says nothing
    assert main([*argv, "--precision", precision, "--force", "--out", str(out)]) == 0
    manifest = read_manifest(out)
    missed = [m for m in manifest.measured if not is_within(m) and m.unit != "ratio of time"]
    assert missed == []
    assert {"image", "latents", "transformer_2", "fused"} <= {m.what for m in manifest.measured}
