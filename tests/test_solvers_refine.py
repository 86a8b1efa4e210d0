"""Teacher refinement in real pipelines: what the teacher sees, what it changes, what it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.adapters import save_adapter
from fewstep.errors import ConfigError, PipelineError
from fewstep.pipeline import FewStepPipeline, TeacherRefine
from fewstep.pipeline.call_arguments import fill_arguments
from fewstep.pipeline.pipeline_denoiser import PipelineDenoiser
from fewstep.pipeline.teacher_refine import OWN_STREAM
from fewstep.recipe import Guidance, Sampler
from fewstep.recipe_plan import plan_steps
from fewstep.trajectory import advance
from tests.tiny_pipelines import ALL_FAMILIES, FLUX, SD3, SD15, TinyFamily, record_denoiser

EVERY_FAMILY = pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.name)
SEEDS = (3, 4)


def student(family: TinyFamily, folder: Path, **changes: Any) -> Any:
    """A tiny pipeline whose adapter changes every linear layer it names to_q, to_k or to_v."""
    pipe = family.build()
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, module in pipe.components[family.denoisers[0]].named_modules():
        if name.endswith(("to_q", "to_k", "to_v")) and "refiner" not in name:
            shape = (module.out_features, module.in_features)
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, shape[1], generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], 2, generator=generator)
    component = "unet" if family.denoisers[0] == "unet" else "transformer"
    file = save_adapter(
        folder / "student.safetensors",
        tensors,
        recipe=family.recipe(**changes),
        rank=2,
        alpha=2.0,
        title="test",
        component=component,
    )
    wrapped = FewStepPipeline.wrap(pipe, adapter=file)
    wrapped.set_progress_bar_config(disable=True)
    return wrapped


def steps_of(pipe: Any, family: TinyFamily, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    """(sample, x0, next) of every step of one call, in the scheduler's layout, float32."""
    seen = []
    scheduler = pipe.scheduler
    step = scheduler.step

    def watched(output: Any, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        result = step(output, timestep, sample, **kwargs)
        following, x0 = result if isinstance(result, tuple) else result.to_tuple()
        seen.append((sample.clone(), x0.clone(), following.clone()))
        return result

    scheduler.step = watched
    try:
        pipe(**family.arguments(2), seed=list(SEEDS), **options)
    finally:
        del scheduler.step
    return seen


@EVERY_FAMILY
def test_the_first_step_is_the_definition(family: TinyFamily, tmp_path: Path) -> None:
    """By hand: re-noise the student's x0, ask the base through its own stock pipeline, mix."""
    pipe = student(family, tmp_path)
    sample, x0, plain_next = steps_of(pipe, family)[0]
    refined = steps_of(pipe, family, teacher_refine=TeacherRefine(scale=0.4))[0]

    planned = plan_steps(pipe.recipe)[0]
    own = [torch.Generator().manual_seed(seed ^ OWN_STREAM) for seed in SEEDS]
    noise = pipe.scheduler.draw_noise(x0, own)
    if x0.ndim == 3:  # packed: outside a call the scheduler does not know how
        noise = packed_noise(pipe, own)
    level = planned.following
    base = family.build()
    arguments = fill_arguments(type(base), family.arguments(2), pipe.recipe, num_steps=4, seed=None)
    teacher = PipelineDenoiser(base, arguments)(level.alpha * x0 + level.sigma * noise, level)
    mixed = 0.6 * x0 + 0.4 * teacher
    torch.testing.assert_close(refined[1], mixed, rtol=1e-3, atol=1e-4)
    expected = advance(planned, sample, mixed, None)
    torch.testing.assert_close(refined[2], expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(refined[2], plain_next, atol=1e-3)


def packed_noise(pipe: Any, generators: list[torch.Generator]) -> torch.Tensor:
    """Image-shaped draws in 2x2 patches, as FLUX and Qwen-Image order them."""
    draws = []
    for generator in generators:
        generator.manual_seed(generator.initial_seed())
        draws.append(torch.randn(NOISE_SHAPES[type(pipe).__name__], generator=generator))
    batch = torch.stack([draw.reshape(draw.shape[-3:]) for draw in draws])
    count, channels, height, width = batch.shape
    patches = batch.reshape(count, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * 4)


NOISE_SHAPES = {family.build().__class__.__name__: family.latent_shape for family in ALL_FAMILIES}


@pytest.mark.parametrize("family", [SD15, FLUX], ids=lambda family: family.name)
def test_scale_0_is_the_picture_without_it_and_seeds_repeat(
    family: TinyFamily, tmp_path: Path
) -> None:
    """Re-noising steps too: the refinement's noise comes from a stream of its own."""
    pipe = student(family, tmp_path, sampler=Sampler(stochasticity=1.0))
    plain = steps_of(pipe, family)[-1][2]
    nothing = steps_of(pipe, family, teacher_refine=TeacherRefine(scale=0.0, steps=3))[-1][2]
    assert torch.equal(nothing, plain)
    once = steps_of(pipe, family, teacher_refine=TeacherRefine(scale=0.5))[-1][2]
    again = steps_of(pipe, family, teacher_refine=TeacherRefine(scale=0.5))[-1][2]
    assert torch.equal(once, again)
    assert not torch.allclose(once, plain, atol=1e-3)
    assert torch.equal(steps_of(pipe, family)[-1][2], plain)  # and nothing is left behind


def test_only_the_first_steps_cost_another_call(tmp_path: Path) -> None:
    pipe = student(SD3, tmp_path)
    calls = record_denoiser(pipe, SD3)
    steps_of(pipe, SD3, teacher_refine=TeacherRefine(steps=2))
    levels = pipe.recipe.levels()
    told = [float(t[0]) for _, t, _ in calls]
    expected = [0, 1, 1, 2, 2, 3]  # student, teacher at the next level, ...
    assert told == pytest.approx([levels[i].timestep for i in expected])


def test_the_teacher_can_look_at_another_level(tmp_path: Path) -> None:
    pipe = student(SD3, tmp_path)
    calls = record_denoiser(pipe, SD3)
    steps_of(pipe, SD3, teacher_refine=TeacherRefine(renoise=0.7))
    assert float(calls[1][1][0]) == pytest.approx(700.0)


def test_the_adapter_is_on_again_afterwards(tmp_path: Path) -> None:
    pipe = student(SD3, tmp_path)
    before = steps_of(pipe, SD3)[-1][2]
    with pytest.raises(PipelineError, match="reached the last step, which ends at clean data"):
        steps_of(pipe, SD3, teacher_refine=TeacherRefine(steps=4))
    assert torch.equal(steps_of(pipe, SD3)[-1][2], before)


def test_without_an_adapter_there_is_no_teacher() -> None:
    pipe: Any = FewStepPipeline.wrap(SD3.build(), recipe=SD3.recipe())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(PipelineError, match="needs a few-step adapter to switch off"):
        pipe(**SD3.arguments(1), seed=0, teacher_refine=TeacherRefine())


def test_a_fused_adapter_cannot_be_switched_off(tmp_path: Path) -> None:
    pipe = student(SD3, tmp_path)
    pipe.fuse()
    with pytest.raises(PipelineError, match="it is fused into the weights; load it unfused"):
        pipe(**SD3.arguments(1), seed=0, teacher_refine=TeacherRefine())


def test_a_guided_student_is_refused_in_one_sentence(tmp_path: Path) -> None:
    guidance = Guidance(mode="cfg", scale=2.0, negative_prompt="works")
    pipe = student(SD15, tmp_path, guidance=guidance)
    arguments = SD15.arguments(1)
    with pytest.raises(PipelineError, match="needs one network pass per step"):
        pipe(
            **arguments,
            negative_prompt_embeds=arguments["prompt_embeds"],
            seed=0,
            teacher_refine=TeacherRefine(),
        )


def test_a_pipeline_that_is_read_wrong_is_refused(tmp_path: Path) -> None:
    """A pipeline that tells its network another time than the table says, and one that scales."""
    pipe = student(SD3, tmp_path)
    transformer = pipe.transformer
    handle = transformer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "timestep": kwargs["timestep"] / 3}),
        with_kwargs=True,
    )
    with pytest.raises(PipelineError, match="does not know how StableDiffusion3Pipeline calls"):
        pipe(**SD3.arguments(1), seed=0, teacher_refine=TeacherRefine())
    handle.remove()
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: step(3.0 * output, *args, **kwargs)
    with pytest.raises(PipelineError, match="does not know how"):
        pipe(**SD3.arguments(1), seed=0, teacher_refine=TeacherRefine())


@pytest.mark.parametrize("values", [{"scale": 1.5}, {"steps": 0}, {"renoise": 0.0}])
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="teacher_refine"):
        TeacherRefine(**values)
