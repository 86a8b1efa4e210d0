"""Facts about drawing digits and the rows of a report, on untrained teachers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from rich.progress import Progress
from torch import Tensor

from fewstep.adapters import save_adapter
from fewstep.digits.data import balanced_prompts
from fewstep.digits.draw import MAX_RUN_SEED, generate_images, generators, picture_seeds
from fewstep.digits.evaluate import (
    evaluate_adapter,
    judge_real,
    judge_student,
    judge_teacher,
    load_student,
    sampler_name,
)
from fewstep.digits.judge import DigitsJudge
from fewstep.digits.models import build_autoencoder
from fewstep.digits.rows import Row
from fewstep.digits.teacher_sampler import (
    DigitsPipeline,
    load_teacher,
    schedule_of,
    teacher_images,
    teacher_latents,
)
from fewstep.digits.teachers import T5_LENGTH, build_sd3, build_sd15
from fewstep.errors import ConfigError, PipelineError, RecipeError, ShapeError
from fewstep.recipe import Base, FewStepRecipe, Grid, Lora, Sampler, Schedule
from fewstep.trainer.evaluation import EVALUATION_SEED

BUILDERS = {"sd3": build_sd3, "sd15": build_sd15}


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return DigitsJudge()


@pytest.fixture(scope="module", params=BUILDERS)
def teacher(request: pytest.FixtureRequest) -> DigitsPipeline:
    torch.manual_seed(0)
    pipe = BUILDERS[request.param](build_autoencoder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def files(teacher: DigitsPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved teacher and a random adapter for it."""
    folder = tmp_path_factory.mktemp("student")
    teacher.save_pretrained(folder / "base")
    return folder / "base", save_random_adapter(teacher, folder / "student.safetensors")


class TestTeacherSampler:
    def test_equals_diffusers_on_the_same_grid(self, teacher: DigitsPipeline) -> None:
        """Stock Euler/DDIM, guidance included, once it is given our grid and our terminal."""
        prompts, seeds = ["seven", "a handwritten two"], [3, 2**31]
        ours = teacher_latents(teacher, prompts, seeds, num_steps=4, guidance_scale=1.5)
        stock = {"prompt": prompts, "guidance_scale": 1.5, "output_type": "latent"}
        pipe: Any = teacher
        noise = torch.stack([torch.randn((16, 8, 8), generator=g) for g in generators(seeds)])
        if isinstance(teacher, StableDiffusion3Pipeline):
            theirs = pipe(
                **stock,
                latents=noise,
                sigmas=[1.0, 0.75, 0.5, 0.25],
                num_inference_steps=4,
                max_sequence_length=T5_LENGTH,
            ).images
        else:
            first = schedule_of(teacher).sigma_of_timestep(999.0)
            pipe = build_like(teacher)
            theirs = pipe(**stock, latents=noise * first, num_inference_steps=4).images
        assert isinstance(theirs, Tensor)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("scale", "nfe"), [(1.0, 3), (1.5, 6)])
    def test_the_network_is_called_as_often_as_the_row_says(
        self, teacher: DigitsPipeline, judge: DigitsJudge, scale: float, nfe: int
    ) -> None:
        sizes: list[int] = []
        is_sd3 = isinstance(teacher, StableDiffusion3Pipeline)
        network = teacher.transformer if is_sd3 else teacher.unet
        hook = network.register_forward_hook(lambda *call: sizes.append(len(call[2][0])))
        judged = judge_teacher(teacher, judge, num_steps=3, guidance_scale=scale, num_images=20)
        hook.remove()
        assert sum(sizes) == 20 * nfe
        assert judged.row.nfe == nfe
        assert judged.row.sampler == ("euler" if is_sd3 else "ddim")
        assert judged.images.shape == (20, 64, 64, 3)

    def test_pictures_do_not_depend_on_the_batch_size(self, teacher: DigitsPipeline) -> None:
        prompts, _ = balanced_prompts(5)
        options = {"num_steps": 2, "guidance_scale": 1.5}
        whole = teacher_images(teacher, prompts, picture_seeds(1, 5), **options)
        parts = teacher_images(teacher, prompts, picture_seeds(1, 5), **options, batch_size=2)
        difference = np.abs(whole.images.astype(int) - parts.images)
        assert difference.max() <= 1  # float32 sums in another order may round the other way

    def test_one_step_is_one_prediction_from_pure_noise(self, teacher: DigitsPipeline) -> None:
        """At one step the result is x0 itself: its seed's noise, not fresh noise, decides."""
        options = {"num_steps": 1, "guidance_scale": 1.0}
        first = teacher_latents(teacher, ["one"], [5], **options)
        assert torch.equal(first, teacher_latents(teacher, ["one"], [5], **options))
        assert not torch.allclose(first, teacher_latents(teacher, ["one"], [6], **options))

    def test_a_saved_teacher_loads_and_draws_the_same(
        self, teacher: DigitsPipeline, tmp_path: Path
    ) -> None:
        teacher.save_pretrained(tmp_path)
        loaded = load_teacher(tmp_path)
        options = {"num_steps": 2, "guidance_scale": 1.5}
        ours = teacher_latents(teacher, ["nine"], [1], **options)
        assert torch.equal(ours, teacher_latents(loaded, ["nine"], [1], **options))

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(PipelineError, match="model_index.json"):
            load_teacher(tmp_path)

    def test_zero_steps_are_refused(self, teacher: DigitsPipeline) -> None:
        with pytest.raises(ConfigError, match="num_steps"):
            teacher_images(teacher, ["one"], [0], num_steps=0, guidance_scale=1.0)


def build_like(teacher: DigitsPipeline) -> Any:
    """The same SD1.5 teacher with a DDIM scheduler that ends at truly clean data."""
    scheduler = DDIMScheduler.from_config(teacher.scheduler.config, set_alpha_to_one=True)
    pipe = type(teacher)(**{**teacher.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestGenerateImages:
    def test_draws_what_the_pipeline_draws_one_by_one(self, teacher: DigitsPipeline) -> None:
        pipe: Any = teacher
        prompts, seeds = ["three", "four", "five"], [7, 8, 9]
        options = {"num_inference_steps": 2, "guidance_scale": 1.5}
        drawn = generate_images(teacher, prompts, seeds, options=options, batch_size=2)
        for index, (prompt, generator) in enumerate(zip(prompts, generators(seeds), strict=True)):
            alone = np.asarray(pipe(prompt, generator=generator, **options).images[0])
            assert np.abs(drawn.images[index].astype(int) - alone).max() <= 1
        assert drawn.images.dtype == np.uint8
        assert drawn.seconds_per_image > 0.0

    def test_the_bar_ends_full(self, teacher: DigitsPipeline) -> None:
        progress = Progress(disable=True)
        options = {"num_inference_steps": 1}
        generate_images(teacher, ["one"] * 3, [0, 1, 2], options=options, progress=progress)
        (task,) = progress.tasks
        assert task.completed == task.total == 3

    def test_a_seed_per_prompt_is_needed(self, teacher: DigitsPipeline) -> None:
        with pytest.raises(ShapeError, match="one seed per prompt"):
            generate_images(teacher, ["one", "two"], [0], options={})
        with pytest.raises(ShapeError, match="0 prompts"):
            generate_images(teacher, [], [], options={})


class TestSeeds:
    def test_runs_of_different_seeds_share_no_picture(self) -> None:
        assert picture_seeds(2, 3) == [2_000_000, 2_000_001, 2_000_002]
        assert not set(picture_seeds(0, 2000)) & set(picture_seeds(1, 2000))

    def test_no_picture_was_used_to_pick_a_checkpoint(self) -> None:
        assert picture_seeds(MAX_RUN_SEED, 1_000_000)[-1] < EVALUATION_SEED

    @pytest.mark.parametrize(("seed", "count"), [(-1, 1), (500, 1), (0, 1_000_001)])
    def test_seeds_out_of_range_are_refused(self, seed: int, count: int) -> None:
        with pytest.raises(ConfigError, match="wanted a seed of 0 to 499"):
            picture_seeds(seed, count)


class TestEvaluateAdapter:
    """An untrained teacher with a random adapter: the numbers are bad, the bookkeeping is not."""

    def test_one_row_per_sampler_in_order(
        self, files: tuple[Path, Path], judge: DigitsJudge
    ) -> None:
        report = evaluate_adapter(
            *files, [1, 2], 20, 3, teacher_steps=[2], guidance_scale=1.5, judge=judge
        )
        report = json.loads(json.dumps(report, allow_nan=False))
        rows = [Row.from_dict(row) for row in report["rows"]]
        assert [(row.name, row.steps, row.nfe) for row in rows] == [
            ("teacher", 2, 4),
            ("student", 1, 1),
            ("student", 2, 2),
            ("real", 0, 0),
        ]
        assert [row.guidance_scale for row in rows] == [1.5, 1.0, 1.0, 1.0]
        assert {row.seed for row in rows} == {3}
        assert report["frechet_floor"] == judge.frechet_floor(20, seed=3)

    def test_no_step_count_means_the_recipe_s_own(
        self, files: tuple[Path, Path], judge: DigitsJudge
    ) -> None:
        report = evaluate_adapter(*files, num_images=20, judge=judge)
        assert [row["steps"] for row in report["rows"]] == [2, 0]

    def test_a_step_count_the_recipe_lacks_is_refused(
        self, files: tuple[Path, Path], judge: DigitsJudge
    ) -> None:
        with pytest.raises(RecipeError, match="not made for 7 steps"):
            evaluate_adapter(*files, [7], 20, judge=judge)

    @pytest.mark.parametrize(("scale", "is_equal"), [(0.0, True), (1.0, False)])
    def test_a_student_that_changes_nothing_draws_what_its_teacher_draws(
        self, teacher: DigitsPipeline, files: tuple[Path, Path], scale: float, is_equal: bool
    ) -> None:
        """Same grid, same noise, no guidance: two independent samplers, one picture."""
        prompts, seeds = ["seven", "a handwritten two"], [3, 4]
        student = load_student(*files, recipe_for(teacher, Lora(scale=scale)))
        options = {"num_inference_steps": 2, "output_type": "latent"}
        found = student(prompts, generator=generators(seeds), **options).images
        expected = teacher_latents(teacher, prompts, seeds, num_steps=2, guidance_scale=1.0)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) == is_equal

    def test_the_row_judges_the_pictures_the_pipeline_draws(
        self, files: tuple[Path, Path], judge: DigitsJudge
    ) -> None:
        student = load_student(*files)
        judged = judge_student(student, judge, num_steps=1, num_images=20, seed=1)
        prompts, labels = balanced_prompts(20)
        seeds = picture_seeds(1, 20)
        options = {"num_inference_steps": 1}
        drawn = generate_images(student, prompts, seeds, options=options)
        assert np.array_equal(judged.images, drawn.images)
        assert judged.row.frechet == judge.score(drawn.images, labels).frechet


def recipe_for(teacher: DigitsPipeline, lora: Lora) -> FewStepRecipe:
    """Grids of 1 and 2 steps on the teacher's own evenly spaced timesteps."""
    schedule = schedule_of(teacher)
    is_sd3 = isinstance(teacher, StableDiffusion3Pipeline)
    vp = Schedule(kind="vp", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    grids = []
    for count in (1, 2):
        timesteps = schedule.uniform_timesteps(count)
        sigmas = (*(schedule.sigma_of_timestep(t) for t in timesteps), 0.0)
        grids.append(Grid(timesteps=timesteps, sigmas=sigmas))
    return FewStepRecipe(
        base=Base(
            family="sd3" if is_sd3 else "sd15",
            prediction="flow" if is_sd3 else "epsilon",
            schedule=Schedule(kind="flow", shift=1.0) if is_sd3 else vp,
            max_sequence_length=T5_LENGTH if is_sd3 else None,
        ),
        grids=tuple(grids),
        default_steps=2,
        lora=lora,
    )


def save_random_adapter(teacher: DigitsPipeline, file: Path) -> Path:
    """A rank-2 adapter, far from zero, on every attention value of the denoiser."""
    is_sd3 = isinstance(teacher, StableDiffusion3Pipeline)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for path, module in (teacher.transformer if is_sd3 else teacher.unet).named_modules():
        if path.endswith(".to_v"):
            height, width = module.weight.shape
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, width, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(height, 2, generator=generator)
    return save_adapter(
        file,
        tensors,
        recipe=recipe_for(teacher, Lora()),
        rank=2,
        alpha=2.0,
        title="random",
        component="transformer" if is_sd3 else "unet",
    )


class TestRows:
    def test_a_row_survives_json(self, judge: DigitsJudge) -> None:
        row = judge_real(judge)
        data = json.loads(json.dumps(row.to_dict(), allow_nan=False))
        assert Row.from_dict(data) == row
        assert (row.name, row.nfe, row.num_images) == ("real", 0, 898)

    def test_a_row_with_an_unknown_column_is_refused(self, judge: DigitsJudge) -> None:
        with pytest.raises(ConfigError, match="fid"):
            Row.from_dict({**judge_real(judge).to_dict(), "fid": 1.0})

    @pytest.mark.parametrize(
        ("stochasticity", "name"), [(0.0, "euler"), (1.0, "renoise"), (0.3, "gamma 0.3")]
    )
    def test_a_sampler_is_named_by_its_recipe(self, stochasticity: float, name: str) -> None:
        recipe = FewStepRecipe(
            base=Base(family="sd3", prediction="flow", schedule=Schedule(kind="flow", shift=1.0)),
            grids=(Grid(timesteps=(1000.0,), sigmas=(1.0, 0.0)),),
            default_steps=1,
            sampler=Sampler(stochasticity=stochasticity),
        )
        assert sampler_name(recipe) == name

    def test_all_figures_of_an_untrained_teacher_are_finite(
        self, teacher: DigitsPipeline, judge: DigitsJudge
    ) -> None:
        row = judge_teacher(teacher, judge, num_steps=1, guidance_scale=1.0, num_images=20).row
        figures = [value for value in row.to_dict().values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in figures)
        assert row.frechet > 50.0
