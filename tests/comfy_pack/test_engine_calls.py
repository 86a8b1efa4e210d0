"""ComfyUI's calls of a network as the graph's inputs: units, names, batches, refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.comfy_nodes.engine_calls import Call, predict
from fewstep.errors import RuntimeSettingError
from fewstep.recipe import Guidance
from fewstep.runtime.export_folder import ExportFolder
from fewstep.runtime.hosts.stable_diffusion import guidance_embedding
from tests.comfy_pack.engine_doubles import engine_of
from tests.tiny.recipes import flow_recipe, vp_recipe


def call(*timesteps: float, side: int = 8, **changes: Any) -> Call:
    """A call for so many pictures."""
    count = len(timesteps)
    generator = np.random.default_rng(0)
    return Call(
        **{
            "sample": generator.standard_normal((count, 4, side, side)).astype(np.float32),
            "timesteps": np.array(timesteps, np.float32),
            "states": generator.standard_normal((count, 3, 8)).astype(np.float32),
            **changes,
        }
    )


def test_pictures_at_one_timestep_are_one_run() -> None:
    engine, loader = engine_of("sd15")
    asked = call(999.0, 999.0)
    assert np.array_equal(predict(engine, asked), asked.sample)
    (fed,) = loader.sessions["unet/model.onnx"].calls
    assert fed["timestep"] == 999.0
    assert fed["timestep"].shape == ()


def test_pictures_at_different_timesteps_are_run_apart_and_put_back_in_order() -> None:
    engine, loader = engine_of("sd15")
    asked = call(749.0, 249.0, 749.0)
    assert np.array_equal(predict(engine, asked), asked.sample)
    runs = loader.sessions["unet/model.onnx"].calls
    assert [(float(fed["timestep"]), len(fed["sample"])) for fed in runs] == [(249, 1), (749, 2)]
    assert np.array_equal(runs[1]["sample"], asked.sample[[0, 2]])


def test_a_flux_sigma_is_told_as_it_is_and_latents_are_packed() -> None:
    engine, loader = engine_of("flux")
    pooled = np.ones((1, 5), np.float32)
    found = predict(engine, call(0.75, pooled=pooled))
    assert found.shape == (1, 4, 8, 8)
    (fed,) = loader.sessions["transformer/model.onnx"].calls
    assert fed["hidden_states"].shape == (1, 16, 16)
    np.testing.assert_allclose(fed["timestep"], [0.75])
    np.testing.assert_allclose(fed["guidance"], [1.0])


def test_a_named_guidance_replaces_the_recipes() -> None:
    recipe = flow_recipe("flux", guidance=Guidance(mode="embedded", scale=4.0))
    engine, loader = engine_of("flux", recipe)
    pooled = np.ones((1, 5), np.float32)
    predict(engine, call(0.5, pooled=pooled))
    predict(engine, call(0.5, pooled=pooled, told={"guidance": np.array([2.5], np.float32)}))
    runs = loader.sessions["transformer/model.onnx"].calls
    assert [float(fed["guidance"][0]) for fed in runs] == [4.0, 2.5]


def test_a_latent_consistency_model_is_told_sinusoids_of_the_scale() -> None:
    recipe = vp_recipe("sd15", guidance=Guidance(mode="embedded", scale=4.0))
    engine, loader = engine_of("sd15", recipe)
    predict(engine, call(999.0))
    predict(engine, call(999.0, told={"guidance": np.array([8.5], np.float32)}))
    own, named = loader.sessions["unet/model.onnx"].calls
    np.testing.assert_array_equal(own["timestep_cond"], guidance_embedding(3.0, 6))
    np.testing.assert_array_equal(named["timestep_cond"], guidance_embedding(7.5, 6))


def test_sizes_named_in_the_conditioning_reach_sdxl() -> None:
    engine, loader = engine_of("sdxl")
    sizes = np.array([[512.0, 768.0, 8.0, 0.0, 1024.0, 1024.0]], np.float32)
    pooled = np.ones((1, 5), np.float32)
    predict(engine, call(999.0, pooled=pooled, told={"time_ids": sizes}))
    predict(engine, call(999.0, pooled=pooled))
    named, own = loader.sessions["unet/model.onnx"].calls
    np.testing.assert_array_equal(named["time_ids"], sizes)
    np.testing.assert_array_equal(own["time_ids"], [[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])


def test_without_a_mask_every_token_counts() -> None:
    engine, loader = engine_of("pixart")
    predict(engine, call(999.0))
    predict(engine, call(999.0, mask=np.array([[1, 1, 0]])))
    first, second = loader.sessions["transformer/model.onnx"].calls
    assert first["encoder_attention_mask"].tolist() == [[1, 1, 1]]
    assert second["encoder_attention_mask"].tolist() == [[1, 1, 0]]


def test_a_wrong_size_lists_those_it_can_make() -> None:
    engine, _ = engine_of("sd15")
    with pytest.raises(RuntimeSettingError) as refused:
        predict(engine, call(999.0, side=7))
    assert str(refused.value) == (
        "'tiny' cannot make 56x56: width and height must be multiples of 16 (trained at 512x512); "
        "set the empty latent to such a size."
    )


def test_a_grid_of_places_has_a_largest_size(tmp_path: Path) -> None:
    engine, _ = engine_of("sd15")
    (tmp_path / "unet").mkdir()
    config = {"pos_embed_max_size": 3, "patch_size": 2}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    engine.folder = replace(engine.folder, root=tmp_path)
    with pytest.raises(RuntimeSettingError, match="multiples of 16 up to 48"):
        predict(engine, call(999.0))
    assert isinstance(engine.folder, ExportFolder)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"states": np.ones((1, 3, 16), np.float32)}, "text 16 wide"),
        ({"states": None}, "none"),
    ],
)
def test_conditioning_of_another_model_is_refused(changes: dict[str, Any], got: str) -> None:
    engine, _ = engine_of("sd15")
    with pytest.raises(RuntimeSettingError) as refused:
        predict(engine, call(999.0, **changes))
    assert f"reads text 8 wide, and this CONDITIONING has {got};" in str(refused.value)


def test_a_missing_pooled_output_is_refused() -> None:
    engine, _ = engine_of("sdxl")
    with pytest.raises(RuntimeSettingError, match="reads pooled output 5 wide"):
        predict(engine, call(999.0))
