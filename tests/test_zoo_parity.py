"""The zoo's recipes against the stock schedulers their authors use: same network, same noise.

Stock tables are float32 and multiply what the network said by 1 / alpha (15 at t = 999), which
is what the tolerance leaves room for. The weights themselves are not here; what is proved is that
FewStepScheduler does with a recipe what the named stock scheduler does.
"""

import math
from collections.abc import Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.schedulers import FewStepScheduler
from fewstep.zoo import ZooEntry, entries, entry

# diffusers asks numpy for copies of tensors in a way numpy 2 means to stop
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
stock: Any = diffusers
TOLERANCE = 2e-4
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ANIMATEDIFF = {**SD, "beta_schedule": "linear"}
PIXART = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
LCM_NAMES = ("lcm-dreamshaper-v7", "lcm-lora-sdxl", "flash-sd", "pcm-sdxl-lcmlike")
HYPER = (
    "hyper-{0}-2steps-lora hyper-{0}-4steps-lora hyper-{0}-8steps-lora hyper-{0}-8steps-cfg-lora"
)
EULER_NAMES = (
    "sdxl-lightning-2step-lora",
    "sdxl-lightning-4step-unet",
    "sdxl-lightning-8step-lora",
)


def network(sample: Tensor, timestep: float | Tensor) -> Tensor:
    """A stand-in that depends on what it sees and on the clock it is told."""
    return torch.tanh(sample) * (0.5 + float(timestep) / 2000.0)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def first(seed: int = 1) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def ours(found: ZooEntry, count: int | None = None, mu: float | None = None) -> Tensor:
    """The recipe's own trajectory from unit noise."""
    recipe = found.required_recipe()
    scheduler = FewStepScheduler(recipe)
    scheduler.set_timesteps(count, mu=mu)
    # Pipelines of flow models leave the noise as it is; the others multiply it.
    sample = first() if scheduler.is_flow else first() * scheduler.init_noise_sigma
    generator = noise()
    for timestep in scheduler.timesteps:
        output = network(sample, timestep)
        sample = scheduler.step(output, timestep, sample, generator, return_dict=False)[0]
    return sample


def theirs(scheduler: Any, sample: Tensor, **step: Any) -> Tensor:
    """A stock scheduler's trajectory; its network sees the scaled sample."""
    for timestep in scheduler.timesteps:
        output = network(scheduler.scale_model_input(sample, timestep), timestep)
        sample = scheduler.step(output, timestep, sample, return_dict=False, **step)[0]
    return sample


def counts(found: ZooEntry) -> list[int]:
    recipe = found.required_recipe()
    return [grid.num_steps for grid in recipe.grids]


def named(prefix: str, suffix: str = "") -> list[str]:
    return [
        found.name
        for found in entries()
        if found.name.startswith(prefix) and found.name.endswith(suffix)
    ]


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        *((name, SD) for name in LCM_NAMES),
        ("animatelcm", ANIMATEDIFF),
        ("pixart-lcm-lora-xl-2-1024-ms", PIXART),
    ],
)
def test_lcm_entries_are_stock_lcm(name: str, betas: dict[str, Any]) -> None:
    found = entry(name)
    for count in counts(found):
        scheduler = stock.LCMScheduler(**betas)
        scheduler.set_timesteps(count)
        assert [*found.required_recipe().grid(count).timesteps] == scheduler.timesteps.tolist()
        expected = theirs(scheduler, first(), generator=noise())
        assert_same(ours(found, count), expected)


def test_lcms_boundary_scalings_are_the_identity_on_the_zoos_grids() -> None:
    """c_skip is left out of our step; on every timestep the zoo uses it is below 1e-6."""
    scheduler = stock.LCMScheduler(**SD)
    scheduler.set_timesteps(4)
    renoised = [e.recipe for e in entries() if e.recipe and e.recipe.sampler.stochasticity == 1.0]
    used = {
        t for r in renoised if r.base.schedule.kind == "vp" for g in r.grids for t in g.timesteps
    }
    assert min(used) == 139.0
    for timestep in used:
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert abs(skip) < 1e-6
        assert abs(out - 1.0) < 1e-6


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        ("dmd2-sdxl-4step-lora", [999, 749, 499, 249]),
        ("dmd2-sdxl-1step-unet", [399]),
        ("hyper-sdxl-1step-unet", [800]),
    ],
)
def test_custom_timesteps_of_stock_lcm(name: str, timesteps: list[int]) -> None:
    scheduler = stock.LCMScheduler(**SD)
    scheduler.set_timesteps(timesteps=timesteps)
    expected = theirs(scheduler, first(), generator=noise())
    assert_same(ours(entry(name)), expected)


@pytest.mark.parametrize(
    ("name", "eta"),
    [
        ("tcd-sdxl-lora", 0.3),
        ("tcd-sd15-lora", 0.3),
        ("pcm-sdxl-smallcfg-2step", 0.0),
        ("pcm-sd15-normalcfg-16step", 0.0),
        ("hyper-sdxl-1step-lora", 1.0),
        ("hyper-sd15-1step-lora", 1.0),
    ],
)
def test_tcd_entries_are_stock_tcd_to_the_last_step(name: str, eta: float) -> None:
    found = entry(name)
    for count in counts(found):
        scheduler = stock.TCDScheduler(**SD)
        scheduler.set_timesteps(count)
        assert [*found.required_recipe().grid(count).timesteps] == scheduler.timesteps.tolist()
        expected = theirs(scheduler, first(), eta=eta, generator=noise())
        assert_same(ours(found, count), expected)


@pytest.mark.parametrize("name", [n for m in ("sd15", "sdxl") for n in HYPER.format(m).split()])
def test_hyper_sd_is_trailing_ddim(name: str) -> None:
    found = entry(name)
    scheduler = stock.DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(found.required_recipe().default_steps)
    assert_same(ours(found), theirs(scheduler, first()))


def test_at_twelve_steps_stock_ddim_steps_beside_its_own_grid() -> None:
    """1000 / 12 is no integer: stock goes from 916 to 833 and reads the result at 832."""
    scheduler = stock.DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(12)
    found = entry("hyper-sdxl-12steps-cfg-lora")
    assert scheduler.timesteps.tolist() == [*found.required_recipe().grid().timesteps]
    assert scheduler.timesteps.tolist()[1] - 1000 // 12 != scheduler.timesteps.tolist()[2]
    expected = theirs(scheduler, first())
    difference = (ours(found) - expected).std() / expected.std()
    assert 0.001 < difference < 0.02


@pytest.mark.parametrize("name", [*EULER_NAMES, "animatediff-lightning-4step", "sd-turbo"])
def test_lightning_is_trailing_euler(name: str) -> None:
    found = entry(name)
    betas = ANIMATEDIFF if name.startswith("animatediff") else SD
    for count in counts(found):
        scheduler = stock.EulerDiscreteScheduler(**betas, timestep_spacing="trailing")
        scheduler.set_timesteps(count)
        expected = theirs(scheduler, first() * scheduler.init_noise_sigma)
        assert_same(ours(found, count), expected)


def test_the_one_step_checkpoint_that_predicts_x0_is_stock_euler() -> None:
    kind = stock.EulerDiscreteScheduler
    scheduler = kind(**SD, timestep_spacing="trailing", prediction_type="sample")
    scheduler.set_timesteps(1)
    expected = theirs(scheduler, first() * scheduler.init_noise_sigma)
    assert_same(ours(entry("sdxl-lightning-1step-unet-x0")), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sdxl_turbo_is_stock_ancestral_euler(count: int) -> None:
    scheduler = stock.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(count)
    expected = theirs(scheduler, first() * scheduler.init_noise_sigma, generator=noise())
    assert_same(ours(entry("sdxl-turbo"), count), expected)


def test_pixart_dmd_returns_what_stock_ddpm_calls_x0() -> None:
    scheduler = stock.DDPMScheduler(**PIXART, clip_sample=False)
    scheduler.set_timesteps(timesteps=[400])
    output = network(first(), 400)
    expected = scheduler.step(output, 400, first(), return_dict=False, generator=noise())[1]
    assert_same(ours(entry("pixart-alpha-dmd-xl-2-512x512")), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("name", "shift"), [("nitrosd-realism", 250), ("nitrosd-vibrant", 500)])
def test_nitrosd_reads_its_output_at_a_clock_of_its_own(name: str, shift: int, count: int) -> None:
    """Its scheduler tells network and formula the shifted timestep; only re-noising keeps the old.

    Written after the README of ChenDarYen/NitroFusion.
    """
    scheduler = stock.LCMScheduler(**SD, original_inference_steps=4)
    scheduler.set_timesteps(count)
    plain = scheduler.timesteps.clone()
    sample, generator = first(), noise()
    for index, told in enumerate((plain * shift / 1000).long()):
        scheduler._step_index, scheduler.timesteps = index, plain
        output = network(sample, told)
        sample = scheduler.step(output, told, sample, generator, return_dict=False)[0]
    assert_same(ours(entry(name), count), sample)


def flow_scheduler(shift: float = 1.0, **more: Any) -> Any:
    scheduler = stock.FlowMatchEulerDiscreteScheduler(shift=shift, **more)
    scheduler.scale_model_input = lambda sample, timestep: sample
    return scheduler


def even(count: int) -> list[float]:
    """What FLUX, Qwen-Image, Z-Image and Krea pipelines pass as sigmas."""
    return torch.linspace(1.0, 1.0 / count, count, dtype=torch.float64).tolist()


@pytest.mark.parametrize(
    ("name", "shift"),
    [("flux1-schnell", 1.0), ("z-image-turbo", 3.0), ("krea-2-turbo", math.exp(1.15))]
    + [("ernie-image-turbo", 3.0), ("fasthunyuan", 17.0)]
    + [(name, 3.0) for name in named("qwen-image", "steps")],
)
def test_flow_entries_with_constant_shift_are_stock_euler(name: str, shift: float) -> None:
    found = entry(name)
    for count in counts(found):
        scheduler = flow_scheduler(shift)
        scheduler.set_timesteps(sigmas=even(count))
        assert_same(ours(found, count), theirs(scheduler, first()))


@pytest.mark.parametrize("mu", [0.5, 0.83, 1.15])
@pytest.mark.parametrize(
    "name", ["hyper-flux1-dev-8steps-lora", "flux1-turbo-alpha", "flux2-klein-4b"]
)
def test_flow_entries_with_a_size_dependent_shift_follow_mu(name: str, mu: float) -> None:
    found = entry(name)
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=even(counts(found)[0]), mu=mu)
    assert_same(ours(found, mu=mu), theirs(scheduler, first()))


@pytest.mark.parametrize("name", ["sd35-large-turbo", *named("hyper-sd3")])
def test_sd3_entries_keep_the_grid_their_authors_sample(name: str) -> None:
    """Stock SD3 pipelines and Stability's sd3_infer.py both end at sigma 0.0089."""
    found = entry(name)
    for count in counts(found):
        scheduler = flow_scheduler(3.0)
        scheduler.set_timesteps(count)
        assert_same(ours(found, count), theirs(scheduler, first()))


def test_flash_sd3_renoises_on_the_stock_grid() -> None:
    scheduler = flow_scheduler(3.0, stochastic_sampling=True)
    scheduler.set_timesteps(4)
    expected = theirs(scheduler, first(), generator=noise())
    assert_same(ours(entry("flash-sd3")), expected)


@pytest.mark.parametrize("name", [*named("wan2.2-lightning"), *named("lightx2v-wan2.1-t2v")])
def test_wan_entries_are_first_order_unipc_at_shift_five(name: str) -> None:
    """The stock Wan scheduler that comes nearest: within 0.001, as its shift ends at 1 / 1000."""
    scheduler = stock.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=1
    )
    scheduler.set_timesteps(4)
    grid = entry(name).required_recipe().grid()
    assert [int(t) for t in grid.timesteps][1:] == scheduler.timesteps.tolist()[1:]
    assert [*grid.sigmas] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-3)


def test_tdm_sd3_is_stock_dpm_solver() -> None:
    scheduler = stock.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0
    )
    scheduler.set_timesteps(4)
    assert_same(ours(entry("tdm-sd3-lora")), theirs(scheduler, first()))


def test_tdm_dreamshaper_is_stock_dpm_solver() -> None:
    scheduler = stock.DPMSolverMultistepScheduler(**SD)
    scheduler.set_timesteps(4)
    expected = theirs(scheduler, first())
    assert_same(ours(entry("tdm-dreamshaper-lora")), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sana_sprint_is_stock_scm(count: int) -> None:
    scheduler = stock.SCMScheduler()
    scheduler.set_timesteps(count, intermediate_timesteps=1.3 if count == 2 else None)
    few = FewStepScheduler(entry("sana-sprint-1.6b").required_recipe())
    few.set_timesteps(count)
    torch.testing.assert_close(few.timesteps, scheduler.timesteps, rtol=0.0, atol=1e-6)
    expected = actual = first() * 0.5
    draws, our_draws = noise(), noise()
    for timestep in scheduler.timesteps[:-1]:
        output = network(expected, timestep)
        expected = scheduler.step(output, timestep, expected, draws, return_dict=False)[0]
        output = network(actual, timestep)
        actual = few.step(output, timestep, actual, our_draws, return_dict=False)[0]
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("name", "shift", "stochastic"),
    [
        ("pcm-sd3-stochastic-shift3", 3.0, True),
        ("pcm-sd3-deterministic-4step-shift3", 3.0, False),
        ("pcm-sd3-deterministic-2step-shift1", 1.0, False),
    ],
)
def test_pcm_sd3_is_its_authors_scheduler(name: str, shift: float, stochastic: bool) -> None:
    """Written after PCMFM{Stochastic,Deterministic}Scheduler(1000, shift, 50) of its repository."""
    found = entry(name)
    for count in counts(found):
        ascending = [shift * u / (1 + (shift - 1) * u) for u in (i / 50 for i in range(1, 51))]
        sigmas = [ascending[::-1][math.floor(i * 50 / count)] for i in range(count)] + [0.0]
        sample, draws = first(), noise()
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            velocity = network(sample, 1000 * sigma)
            if stochastic and following:
                fresh = torch.randn(sample.shape, generator=draws)
                sample = (1 - following) * (sample - sigma * velocity) + following * fresh
            else:
                sample = sample + (following - sigma) * velocity
        assert_same(ours(found, count), sample)


@pytest.mark.parametrize(
    ("name", "is_difference"),
    [("perflow-sd15-dreamshaper", True), ("perflow-sdxl-dreamshaper", False)],
)
def test_perflow_moves_linearly_inside_four_windows(name: str, is_difference: bool) -> None:
    """Written after PeRFlowScheduler ("diff_eps" for SD 1.5, "ddim_eps" for SDXL)."""
    alphas = stock.DDIMScheduler(**SD).alphas_cumprod.double()
    for count in counts(entry(name)):
        sample, clock = first().double(), perflow_clock(count)
        for now, following in zip(clock, [*clock[1:], 0], strict=True):
            epsilon = network(sample, now)
            start = math.ceil(now / 250) * 250
            end, t = start - 250, now
            a_start, a_end = float(alphas[start - 1]), float(alphas[max(end - 1, 0)])
            of_sample = math.sqrt(a_end / a_start)
            of_epsilon = math.sqrt(1 - a_end) - of_sample * math.sqrt(1 - a_start)
            if is_difference:
                of_epsilon = -of_sample * math.sqrt(1 - a_start / a_end)
            below = of_sample * (t - start) + (end - t)
            window_end = (
                of_sample * (end - start) * sample + of_epsilon * (end - t) * epsilon
            ) / below
            sample = sample + (following - t) * (window_end - sample) / (end - t)
        assert_same(ours(entry(name), count).double(), sample)


def perflow_clock(count: int) -> Sequence[int]:
    clock: list[int] = []
    for index, start in enumerate((1000, 750, 500, 250)):
        inside = count // 4 + (1 if index < count % 4 else 0)
        clock += [int(start - 250 * i / inside) for i in range(inside)]
    return clock
