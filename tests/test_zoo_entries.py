"""The zoo's entries: their rules, what must be there, and that every recipe can be obeyed."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from fewstep import strict_json
from fewstep.errors import PipelineError, RecipeError
from fewstep.recipe import FewStepRecipe, Sampler, StepPolicy
from fewstep.schedulers import FewStepScheduler
from fewstep.zoo import ZooEntry, ZooFile, entries, entry, search_entries
from fewstep.zoo.catalogue import FOLDER, UnknownEntryError
from fewstep.zoo.document import BEGIN, END, with_table

ROOT = Path(__file__).resolve().parents[1]
ALL = entries()
NAMES = [found.name for found in ALL]
REPOSITORIES = """
SimianLuo/LCM_Dreamshaper_v7 latent-consistency/lcm-sdxl latent-consistency/lcm-lora-sdv1-5
latent-consistency/lcm-lora-sdxl latent-consistency/lcm-lora-ssd-1b wangfuyun/AnimateLCM
h1t/TCD-SD15-LoRA h1t/TCD-SD21-base-LoRA h1t/TCD-SDXL-LoRA wangfuyun/PCM_Weights ByteDance/Hyper-SD
ByteDance/SDXL-Lightning ByteDance/AnimateDiff-Lightning stabilityai/sdxl-turbo stabilityai/sd-turbo
tianweiy/DMD2 jasperai/flash-sd jasperai/flash-sdxl ChenDY/NitroFusion
hansyan/perflow-sd15-delta-weights hansyan/perflow-sd15-dreamshaper hansyan/perflow-sdxl-dreamshaper
XCLiu/instaflow_0_9B_from_sd_1_5 Luo-Yihong/TDM_dreamshaper_LoRA yresearch/swd-sdxl

stabilityai/stable-diffusion-3.5-large-turbo jasperai/flash-sd3 Luo-Yihong/TDM_sd3_lora
Luo-Yihong/TDM_sd3-5_lora yresearch/swd-medium-4-steps yresearch/swd-medium-6-steps
yresearch/swd-large-4-steps PixArt-alpha/PixArt-LCM-XL-2-1024-MS
PixArt-alpha/PixArt-LCM-LoRA-XL-2-1024-MS PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512
jasperai/flash-pixart Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers
Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers

black-forest-labs/FLUX.1-schnell alimama-creative/FLUX.1-Turbo-Alpha yresearch/swd_flux
Lakonik/pi-FLUX.1 Lakonik/pi-Qwen-Image Lakonik/pi-FLUX.2 black-forest-labs/FLUX.2-klein-4B
black-forest-labs/FLUX.2-klein-9B black-forest-labs/FLUX.2-klein-9b-kv
lightx2v/Qwen-Image-Lightning lightx2v/Qwen-Image-Edit-2511-Lightning
lightx2v/Qwen-Image-2512-Lightning Qwen/Qwen-Image-2.1-Turbo
DiffSynth-Studio/Qwen-Image-Distill-Full DiffSynth-Studio/Qwen-Image-Distill-LoRA
DiffSynth-Studio/Qwen-Image-Distill-DMD2
inclusionAI/TwinFlow inclusionAI/TwinFlow-Z-Image-Turbo Tongyi-MAI/Z-Image-Turbo krea/Krea-2-Turbo
baidu/ERNIE-Image-Turbo hunyuanvideo-community/HunyuanImage-2.1-Distilled-Diffusers
Photoroom/prx-512-t2i-sft-distilled Photoroom/prx-512-t2i-dc-ae-sft-distilled
nvidia/Cosmos3-Super-Text2Image-4Step nvidia/Cosmos3-Super-Image2Video-4Step microsoft/Lens-Turbo
meituan-longcat/LongCat-Image-Edit-Turbo lodestones/Chroma1-Flash OPPOer/Qwen-Image-Pruning
HiDream-ai/HiDream-O1-Image-Dev

tianweiy/CausVid lightx2v/Wan2.1-T2V-14B-CausVid gdhe17/Self-Forcing Kijai/WanVideo_comfy
lightx2v/Wan2.2-Lightning lightx2v/Wan2.2-Distill-Loras
Wan-AI/Wan2.2-Animate-2-14B-Distilled-Diffusers FastVideo/FastWan2.1-T2V-1.3B-Diffusers
FastVideo/FastWan2.1-T2V-14B-Diffusers FastVideo/FastWan2.2-TI2V-5B-Diffusers
FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers FastVideo/SFWan2.2-I2V-A14B-Preview-Diffusers
FastVideo/FastHunyuan-diffusers lightx2v/Hy1.5-Distill-Models
TurboDiffusion/TurboWan2.1-T2V-1.3B-480P TurboDiffusion/TurboWan2.1-T2V-14B-480P
TurboDiffusion/TurboWan2.2-I2V-A14B-720P nvidia/AnyFlow-Wan2.1-1.3B-Diffusers
nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers nvidia/ChronoEdit-14B-Diffusers
Luo-Yihong/TDM_CogVideoX-2B_LoRA Lightricks/LTX-Video Lightricks/LTX-2 Lightricks/LTX-2.3
Lightricks/LTX-2.5 BestWishYsh/Helios-Distilled lightx2v/Minimax-h3-Turbo
larryvrh/MiniMax-H3-Turbo-Lora kandinskylab/Kandinsky-5.0-T2V-Lite-distilled16steps-5s
kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers ACE-Step/acestep-v15-turbo
stabilityai/stable-audio-3-medium
""".split()
WITHOUT_FILES = """
sd35-flash senseflow-sdxl senseflow-sd35-large senseflow-flux flux3-distilled
qwen-image-phased-dmd boogu-image-0.1-turbo anima-1.0-turbo lightx2v-wan2.1-mean-flow
""".split()
LICENCES = {
    "dmd2-sdxl-4step-lora": "cc-by-nc-sa-4.0",
    "flash-sdxl": "cc-by-nc-4.0",
    "nitrosd-realism": "cc-by-nc-4.0",
    "sdxl-turbo": "sai-nc-community (non-commercial)",
    "sdxl-lightning-4step-lora": "openrail++",
}


def plain(**changes: object) -> ZooEntry:
    """A valid entry with one thing changed."""
    return dataclasses.replace(entry("dmd2-sdxl-4step-lora"), **changes)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_reads_back_from_its_own_json(name: str) -> None:
    path = FOLDER / f"{name}.json"
    found = ZooEntry.from_file(path)
    assert found.name == name
    assert found.notes.endswith(".")
    assert (found.unsupported or "").endswith(".") is False  # it ends a sentence of ours
    values = found.to_dict()
    assert strict_json.read(ZooEntry, json.loads(json.dumps(values)), error=RecipeError) == found


def test_every_public_model_of_the_survey_is_there() -> None:
    known = {file.repo for found in ALL for file in found.files}
    assert set(REPOSITORIES) - known == set()
    assert sorted(found.name for found in ALL if not found.files) == sorted(WITHOUT_FILES)


def test_no_file_is_in_two_entries() -> None:
    listed = Counter((file.repo.lower(), file.filename) for e in ALL for file in e.files)
    assert [file for file, count in listed.items() if count > 1] == []


def test_a_path_in_a_repository_fits_one_entry_only() -> None:
    named = [(e.name, file) for e in ALL for file in e.files if file.filename is not None]
    for name, file in named:
        path = (file.filename or "").replace("*", "x")
        fitting = {n for n, other in named if other.is_in(file.repo) and other.is_at(path)}
        assert fitting == {name}, path


def test_licences_that_are_known_are_said() -> None:
    assert {name: entry(name).licence for name in LICENCES} == LICENCES


@pytest.mark.parametrize("name", [found.name for found in ALL if found.unsupported is None])
def test_every_supported_recipe_runs_on_every_grid(name: str) -> None:
    scheduler = FewStepScheduler(entry(name).required_recipe())
    generator = torch.Generator().manual_seed(0)
    for grid in scheduler.recipe.grids:
        mu = None if scheduler.recipe.resolution_shift is None else 0.8
        scheduler.set_timesteps(grid.num_steps, mu=mu)
        assert scheduler.num_inference_steps == grid.num_steps
        scheduler.ladder.start(32, 32)
        height, width = scheduler.ladder.size(grid.sizes[0] if grid.sizes else 1.0)
        sample = torch.randn(1, 4, height, width, generator=generator)
        for timestep in scheduler.timesteps[: grid.num_steps]:
            output = answer(scheduler.recipe, 0.1 * sample)
            sample = scheduler.step(output, timestep, sample, generator).prev_sample
        assert sample.shape == (1, 4, 32, 32)
        assert bool(sample.isfinite().all())


@pytest.mark.parametrize("name", [found.name for found in ALL if found.unsupported is not None])
def test_what_is_not_supported_is_refused_with_its_own_reason(name: str) -> None:
    found = entry(name)
    with pytest.raises(RecipeError, match="is not supported: ") as caught:
        found.required_recipe()
    assert str(found.unsupported) in str(caught.value)
    assert "use " in str(found.unsupported) or "pass " in str(found.unsupported)
    if found.recipe is not None and found.recipe.sampler.kind != "step":
        with pytest.raises(PipelineError, match="this recipe's sampler is '(policy|flow_map)'"):
            one_step(found.recipe)


def answer(recipe: FewStepRecipe, velocity: torch.Tensor) -> torch.Tensor:
    """What a network says; of a policy, all components with the same velocity."""
    policy = recipe.sampler.policy
    if policy is None:
        return velocity
    means = velocity.repeat(1, policy.components, 1, 1)
    if policy.kind == "dx":
        return means
    rest = torch.zeros_like(means[:, : policy.components + 1])  # equal weights, deviation 1
    return torch.cat((means, rest), 1)


def one_step(recipe: FewStepRecipe) -> None:
    """A policy or a flow map is refused when its network has no head."""
    scheduler = FewStepScheduler(recipe)
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))


def test_special_kinds_are_carried() -> None:
    def recipe(name: str) -> FewStepRecipe:
        found = entry(name).recipe
        assert found is not None
        return found

    assert recipe("hyper-sdxl-1step-unet").grids[0].timesteps == (800.0,)
    assert recipe("dmd2-sdxl-1step-unet").grids[0].timesteps == (399.0,)
    assert recipe("pixart-alpha-dmd-xl-2-512x512").grids[0].timesteps == (400.0,)
    assert recipe("sana-sprint-0.6b").base.schedule.kind == "trigflow"
    assert recipe("sana-sprint-0.6b").grid(2).timesteps == (1.5708, 1.3)
    assert recipe("swd-large-4-steps").grids[0].sizes == (0.5, 0.625, 0.75, 1.0)
    policy = StepPolicy(kind="gm", components=8, shift=3.2, temperature=0.3)
    assert recipe("pi-flux1-4step").sampler == Sampler(kind="policy", policy=policy)
    assert recipe("pi-flux1-4step").grids[0].sigmas == pytest.approx(
        (1.0, 0.8889, 0.7059, 0.3478, 0.0), abs=5e-5
    )
    assert recipe("anyflow-wan2.1-14b").sampler.kind == "flow_map"
    assert recipe("flux2-klein-9b").resolution_shift is not None
    second = recipe("ltx-2-distilled-lora").second_stage
    assert second is not None
    assert second.grid.sigmas == (0.909375, 0.725, 0.421875, 0.0)
    assert recipe("hyper-flux1-dev-8steps-lora").lora.scale == 0.125
    assert recipe("tdm-sd3-lora").lora.scale == 0.125
    assert recipe("krea-2-turbo").grids[0].sigmas == pytest.approx(
        (1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0), abs=5e-5
    )
    assert recipe("qwen-image-lightning-8steps").grids[0].sigmas == pytest.approx(
        (1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0), abs=5e-5
    )
    assert recipe("fasthunyuan").grids[0].sigmas == pytest.approx(
        (1, 0.988, 0.971, 0.944, 0.895, 0.773, 0), abs=1e-3
    )


@pytest.mark.parametrize(
    ("name", "boundary"), [("wan2.2-lightning-t2v-a14b", 0.875), ("wan2.2-distill-i2v-a14b", 0.9)]
)
def test_wan_experts_take_two_steps_each(name: str, boundary: float) -> None:
    found = entry(name)
    recipe = found.required_recipe()
    assert [(e.adapter, e.component) for e in recipe.experts] == [
        ("high_noise", "transformer"),
        ("low_noise", "transformer_2"),
    ]
    assert recipe.experts[0].sigma_low == boundary
    assert recipe.grids[0].experts == (0, 0, 1, 1)
    assert recipe.grids[0].timesteps == pytest.approx((1000, 937.5, 2500 / 3, 625))
    assert {file.expert for file in found.files} == {"high_noise", "low_noise"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Not A Slug"}, "small letters"),
        ({"verification": "rumour"}, "verification must be one of authors, card"),
        ({"sources": ()}, "at least one link"),
        ({"sources": ("http://x",)}, "https://"),
        ({"family": "flux"}, "family is 'flux' but the recipe's is 'sdxl'"),
        ({"recipe": None}, "needs a recipe, or unsupported"),
        ({"files": (ZooFile(repo="a/b", expert="high_noise"),)}, "experts"),
    ],
)
def test_a_broken_entry_is_one_sentence(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        plain(**changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("repo", "no-owner"), ("sha256", "abc"), ("fingerprint", "x" * 64), ("filename", "/abs")],
)
def test_a_broken_file_is_one_sentence(field: str, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"files\[\]\.{field}"):
        ZooFile(**{"repo": "owner/name", field: value})


def test_a_damaged_file_of_the_installation_is_named(tmp_path: Path) -> None:
    text = (FOLDER / "sd-turbo.json").read_text()
    for name, content, words in (
        ("sd-turbo.json", "{", "not valid JSON"),
        ("other.json", text, "is called 'sd-turbo'"),
        ("sd-turbo.json", text.replace('"notes"', '"note"'), "unknown key note"),
    ):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(RecipeError, match=f"{name}: .*{words}"):
            ZooEntry.from_file(path)


def test_an_unknown_name_suggests_similar_ones() -> None:
    with pytest.raises(UnknownEntryError, match="did you mean .*dmd2-sdxl-4step-lora"):
        entry("zoo:dmd2-sdxl-4steps-lora")
    with pytest.raises(UnknownEntryError, match="fewstep zoo list"):
        entry("qqqqqqqq")
    assert entry(" ZOO:SD-Turbo ").name == "sd-turbo"


def test_search_wants_every_word() -> None:
    found = {e.name for e in search_entries(["Wan2.2", "LIGHTNING"])}
    assert found == {"wan2.2-lightning-t2v-a14b", "wan2.2-lightning-i2v-a14b"}
    assert search_entries(["wan2.2", "unobtainium"]) == ()


def test_the_table_of_the_documentation_is_current() -> None:
    """Otherwise run: python -m fewstep.zoo docs/zoo.md."""
    text = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
    assert with_table(text, ALL) == text
    assert all(f"[{name}](" in text for name in NAMES)


def test_the_program_that_writes_the_table(tmp_path: Path) -> None:
    path = tmp_path / "zoo.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = [sys.executable, "-m", "fewstep.zoo", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text().startswith("before\n")
    assert "old" not in path.read_text()
    assert "[sd-turbo](" in path.read_text()
    path.write_text("no marks")
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert failed.returncode == 2
    assert "no place for the table" in failed.stderr
