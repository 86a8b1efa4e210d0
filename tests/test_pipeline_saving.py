"""Saved folders: right grid with stock diffusers, whole recipe with fewstep, hub layout, card."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.pipeline import FewStepPipeline, translate_guidance
from fewstep.pipeline.model_card import CARD_MARK
from fewstep.pipeline.saving import write_text
from fewstep.pipeline.stock_scheduler import stock_scheduler
from fewstep.recipe import (
    SIDECAR_NAME,
    FewStepRecipe,
    Guidance,
    Provenance,
    ResolutionShift,
    Sampler,
    Schedule,
    SolverRow,
)
from tests.tiny.distilled import SANA_SPRINT
from tests.tiny.families import ALL_FAMILIES, FLUX, QWEN_IMAGE, SD3, SD15, SDXL, WAN21, Z_IMAGE
from tests.tiny.family import TinyFamily, record_denoiser, seen_timesteps
from tests.tiny.recipes import flow_recipe, vp_recipe

NUMPY_1 = "ignore:__array__ implementation doesn't accept:DeprecationWarning"
pytestmark = pytest.mark.filterwarnings(NUMPY_1)  # EulerDiscreteScheduler's own
UNIT = Sampler(first_noise="unit")
UNIT_LCM = Sampler(stochasticity=1.0, first_noise="unit")
LCM_GRID = (999.0, 759.0, 499.0, 259.0)
EVEN = (1000.0, 750.0, 500.0, 250.0)
SHIFT = ResolutionShift(base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)


def saved(family: TinyFamily, folder: Path, recipe: FewStepRecipe | None = None) -> Any:
    pipe = FewStepPipeline.wrap(family.build(), recipe=recipe or family.recipe())
    pipe.save_pretrained(folder)
    return pipe


def stock_from(folder: Path, family: TinyFamily) -> Any:
    absent = {name: None for name, part in family.build().components.items() if part is None}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_draw(pipe: Any, family: TinyFamily, recipe: FewStepRecipe, **kwargs: Any) -> Any:
    return pipe(
        **family.arguments(1),
        **translate_guidance(type(pipe), recipe.guidance),
        num_inference_steps=recipe.default_steps,
        generator=torch.Generator().manual_seed(3),
        **kwargs,
    )[0]


# recipe, picture equal to ours, largest distance of a timestep
CASES: dict[str, tuple[TinyFamily, FewStepRecipe, bool, float]] = {
    "sd15 euler": (SD15, SD15.recipe(), True, 1e-3),
    "sdxl euler": (SDXL, SDXL.recipe(), True, 1e-3),
    "sd15 ddim": (SD15, vp_recipe("sd15", sampler=UNIT), True, 1e-3),
    "sd15 lcm": (SD15, vp_recipe("sd15", timesteps=LCM_GRID, sampler=UNIT_LCM), True, 1e-3),
    "sdxl dmd2": (SDXL, vp_recipe("sdxl", sampler=UNIT_LCM), True, 1e-3),
    "flux shift": (FLUX, FLUX.recipe(), True, 1e-2),
    "flux even": (FLUX, flow_recipe("flux", EVEN), True, 1e-2),
    "flux sized": (
        FLUX,
        flow_recipe(
            "flux", EVEN, schedule=Schedule(kind="flow", shift=1.0), resolution_shift=SHIFT
        ),
        True,
        1e-2,
    ),
    "qwen-image": (QWEN_IMAGE, QWEN_IMAGE.recipe(), True, 1e-2),
    "z-image": (Z_IMAGE, Z_IMAGE.recipe(), True, 1e-2),
    "wan": (WAN21, WAN21.recipe(), False, 1.001),
    "sd3": (SD3, SD3.recipe(), False, 1.001),
}


@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_gets_the_right_grid_from_the_folder(name: str, tmp_path: Path) -> None:
    family, recipe, is_equal, near = CASES[name]
    ours = saved(family, tmp_path, recipe)
    ours.set_progress_bar_config(disable=True)
    calls = record_denoiser(ours, family)
    picture = ours(**family.arguments(1), seed=3)[0]
    expected = seen_timesteps(calls, family)
    stock = stock_from(tmp_path, family)
    assert "fewstep" not in json.dumps(dict(stock.scheduler.config))
    stand_in = stock_scheduler(type(stock).__name__, recipe, recipe.default_steps)
    assert stand_in.is_exact == is_equal
    assert type(stock.scheduler) is type(stand_in.scheduler)
    calls = record_denoiser(stock, family)
    found = stock_draw(stock, family, recipe, **dict(stand_in.arguments))
    assert seen_timesteps(calls, family) == pytest.approx(expected, abs=near)
    if is_equal:
        torch.testing.assert_close(found, picture, rtol=2e-3, atol=2e-3)
    else:
        assert stand_in.deviations == ("the network is told whole timesteps, one less at most",)
        torch.testing.assert_close(found, picture, rtol=0.05, atol=0.05)


def ancestral_recipe() -> FewStepRecipe:
    """SDXL-Turbo's sampler: the stops of ancestral Euler."""
    recipe = SDXL.recipe()
    karras = [sigma / (1.0 - sigma**2) ** 0.5 for sigma in recipe.grids[0].sigmas[:-1]]
    downs = [after**2 / now for now, after in pairwise(karras)]
    stops = (*(down / (1.0 + down**2) ** 0.5 for down in downs), 0.0)
    return replace(recipe, grids=(replace(recipe.grids[0], stops=stops),))


def test_ancestral_stops_are_ancestral_euler(tmp_path: Path) -> None:
    recipe = ancestral_recipe()
    ours = saved(SDXL, tmp_path, recipe)
    picture = ours(**SDXL.arguments(1), seed=3)[0]
    stock = stock_from(tmp_path, SDXL)
    assert isinstance(stock.scheduler, diffusers.EulerAncestralDiscreteScheduler)
    assert stock_scheduler("StableDiffusionXLPipeline", recipe, 4).is_exact
    found = stock_draw(stock, SDXL, recipe)
    torch.testing.assert_close(found, picture, rtol=2e-3, atol=2e-3)
    other = replace(recipe.grids[0], stops=(0.5, 0.4, 0.1, 0.0))
    stand_in = stock_scheduler("StableDiffusionXLPipeline", replace(recipe, grids=(other,)), 4)
    assert stand_in.scheduler is None
    assert "stops of their own" in stand_in.deviations[0]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sana_sprint_keeps_its_own_scheduler(steps: int) -> None:
    from tests.test_pipeline_sana_sprint import sprint_recipe

    stand_in = stock_scheduler("SanaSprintPipeline", sprint_recipe(), steps)
    assert isinstance(stand_in.scheduler, diffusers.SCMScheduler)
    assert dict(stand_in.arguments) == ({} if steps == 2 else {"intermediate_timesteps": None})
    assert SANA_SPRINT.name == "sana-sprint"


@pytest.mark.parametrize(
    ("class_name", "recipe", "words"),
    [
        ("WanPipeline", flow_recipe("wan", (999.0, 856.0, 665.0, 399.0)), "makes the timesteps"),
        ("FluxPipeline", flow_recipe("flux", (999.0, 856.0, 665.0, 399.0)), "makes the timesteps"),
        ("WanPipeline", flow_recipe("wan", stochasticity=1.0), "draws fresh noise on this grid"),
        ("FluxPipeline", flow_recipe("flux", stochasticity=0.5), "takes this prediction and noise"),
        ("StableDiffusionPipeline", vp_recipe("sd15", timesteps=(800.0,)), "makes the timesteps"),
        (
            "StableDiffusionPipeline",
            vp_recipe("sd15", sampler=Sampler(clip_x0=1.0)),
            "predictions are clipped",
        ),
        (
            "FluxPipeline",
            replace(
                flow_recipe("flux"),
                grids=(
                    replace(
                        flow_recipe("flux").grids[0], solver=(SolverRow(sample=0.5, x0=0.5),) * 4
                    ),
                ),
            ),
            "steps have fitted weights",
        ),
    ],
)
def test_grids_no_stock_scheduler_makes_are_said_to_be_so(
    class_name: str, recipe: FewStepRecipe, words: str
) -> None:
    stand_in = stock_scheduler(class_name, recipe, recipe.default_steps)
    assert stand_in.scheduler is None
    assert words in stand_in.deviations[0]


def test_without_an_equivalent_the_bases_own_scheduler_is_kept_and_the_card_warns(
    tmp_path: Path,
) -> None:
    saved(FLUX, tmp_path, flow_recipe("flux", (999.0, 856.0, 665.0, 399.0)))
    stock = stock_from(tmp_path, FLUX)
    assert stock.scheduler.config.shift == 3.0  # as the tiny base came
    card = (tmp_path / "README.md").read_text()
    assert "Stock diffusers cannot sample this recipe: no stock scheduler makes" in card


def test_tcd_is_told_its_gamma_and_noise_that_is_not_scaled_is_said() -> None:
    recipe = vp_recipe("sdxl", timesteps=LCM_GRID, stochasticity=0.3)
    stand_in = stock_scheduler("StableDiffusionXLPipeline", recipe, 4)
    assert isinstance(stand_in.scheduler, diffusers.TCDScheduler)
    assert dict(stand_in.arguments) == {"eta": 0.3}
    assert not stand_in.is_exact
    assert "the first noise is not scaled to sigma 0.9977" in stand_in.deviations[0]


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda f: f.name)
def test_the_folder_gives_the_same_few_step_pipeline_back(
    family: TinyFamily, tmp_path: Path
) -> None:
    recipe = replace(family.recipe(), sampler=Sampler(stochasticity=1.0))
    ours = saved(family, tmp_path, recipe)
    again = FewStepPipeline.from_pretrained(tmp_path)
    assert again.recipe == recipe
    pictures = [pipe(**family.arguments(1), seed=3)[0] for pipe in (ours, again)]
    torch.testing.assert_close(pictures[1], pictures[0], rtol=1e-4, atol=1e-5)


def test_the_card_has_the_grid_the_calls_and_the_provenance(tmp_path: Path) -> None:
    recipe = replace(
        SD15.recipe(guidance=Guidance(mode="cfg", scale=2.0, negative_prompt="works")),
        provenance=Provenance(licence="CC-BY-NC-4.0"),
    )
    recipe = replace(recipe, base=replace(recipe.base, model_id="org/base"))
    saved(SD15, tmp_path / "student", recipe)
    card = (tmp_path / "student" / "README.md").read_text()
    for part in (
        'base_model: "org/base"',
        'license_name: "CC-BY-NC-4.0"',
        "| 1 | 999.00 | 0.99767 |",
        "8 network evaluations",
        'FewStepPipeline.from_pretrained("student")',
        "num_inference_steps=4, guidance_scale=2.0",
        "`EulerDiscreteScheduler` draws the recipe's own steps.",
    ):
        assert part in card, part
    assert card.startswith("---\n")


def test_a_readme_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    pipe = saved(SD15, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").write_text(f"old\n{CARD_MARK}\n")
    pipe.save_pretrained(tmp_path)
    assert "## Without fewstep" in (tmp_path / "README.md").read_text()


def test_saving_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = saved(SD15, tmp_path)
    scheduler = pipe.scheduler
    pipe.save_pretrained(tmp_path)
    assert pipe.scheduler is scheduler
    assert isinstance(pipe.unwrap().scheduler, diffusers.DDIMScheduler)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x.txt", "\ud800")
    assert list(tmp_path.iterdir()) == []


STOCK_ALONE = """
import sys
class NoFewstep:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fewstep":
            raise ImportError("fewstep is not installed here")
sys.meta_path.insert(0, NoFewstep())
import torch
from diffusers import DiffusionPipeline
where, out = sys.argv[1], sys.argv[2]
local = {"local_files_only": True, "cache_dir": sys.argv[3]} if len(sys.argv) > 3 else {}
absent = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
              image_encoder=None, requires_safety_checker=False)
pipe = DiffusionPipeline.from_pretrained(where, **absent, **local)
pipe.set_progress_bar_config(disable=True)
embeds = torch.load(out + ".in")
picture = pipe(prompt_embeds=embeds, height=32, width=32, num_inference_steps=4, guidance_scale=1.0,
               generator=torch.Generator().manual_seed(3), output_type="latent")[0]
assert not any(name.startswith("fewstep") for name in sys.modules)
torch.save(picture, out)
"""


def draw_without_fewstep(out: Path, where: str, *more: str) -> torch.Tensor:
    torch.save(SD15.arguments(1)["prompt_embeds"], f"{out}.in")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK_ALONE, where, str(out), *more],
        capture_output=True,
        text=True,
        env=environment,
        cwd=out.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out)


def as_hub_cache(folder: Path, cache: Path) -> None:
    """The layout huggingface_hub leaves behind: refs, and a snapshot of links into blobs."""
    repo = cache / "models--someone--student"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
        blob = repo / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_a_hub_copy_loads_with_fewstep_and_where_there_is_none(tmp_path: Path) -> None:
    pipe = saved(SD15, tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(**SD15.arguments(1), seed=3)[0]
    as_hub_cache(tmp_path / "student", tmp_path / "hub")
    stock = draw_without_fewstep(tmp_path / "a.pt", "someone/student", str(tmp_path / "hub"))
    torch.testing.assert_close(stock, picture, rtol=2e-3, atol=2e-3)
    hub: Any = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    again = FewStepPipeline.from_pretrained("someone/student", **hub)
    assert again.recipe == SD15.recipe()
    assert torch.equal(again(**SD15.arguments(1), seed=3)[0], picture)
    assert (tmp_path / "student" / SIDECAR_NAME).is_file()
