"""Policies: exact on what is known in closed form, equal to the peers, the same in every layout."""

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.errors import PipelineError, ShapeError
from fewstep.heads.policy import DxPolicy, GmPolicy, Policy, roll_out, velocity
from fewstep.noise_schedule import Flow, shift_sigma
from fewstep.recipe import StepPolicy
from fewstep.sampling import step
from fewstep.schedulers import FewStepScheduler
from fewstep.schedulers.policy_step import policy_step
from fewstep.toy import GaussianMixture
from fewstep.trajectory import PlannedStep, plain_steps
from tests.policy_files import (
    DX,
    GM,
    follow_by_hand,
    packed,
    policy_recipe,
    reader_by_hand,
    unpacked,
)
from tests.tiny_pipelines import SD3

stock: Any = diffusers
FLOW = Flow()


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planned(now: float, following: float) -> PlannedStep:
    levels = [FLOW.level(1000.0 * sigma) for sigma in (now, following)]
    return plain_steps(levels, FLOW)[0]


def seen_from(mixture: GaussianMixture, sample: Tensor, sigma: float) -> GmPolicy:
    """What a perfect network says at a sample: the exact mixture of clean data given it."""
    alpha, variance = 1.0 - sigma, mixture.variances[0]
    total = alpha**2 * variance + sigma**2
    away = sample[:, None] - alpha * mixture.means
    means = mixture.means + alpha * variance / total * away
    weights = torch.as_tensor(mixture.weights, dtype=sample.dtype).log()
    logits = weights[None, :, None] - away.square().sum(2, keepdim=True) / (2 * total)
    deviation = sample.new_full((len(sample), 1, 1), 0.5 * math.log(variance / total))
    velocities = (sample[:, None] - means) / sigma
    return GmPolicy.from_output(velocities, deviation, logits, sample, sigma)


# --- closed forms


@pytest.mark.parametrize("start", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_exact_mixture_at_one_point_gives_the_exact_mean_at_every_other(
    start: float, dtype: torch.dtype
) -> None:
    means = 2.0 * drawn(3, 4, seed=1, dtype=dtype)
    mixture = GaussianMixture(means, [0.25] * 3, [0.2, 0.5, 0.3])
    policy = seen_from(mixture, drawn(5, 4, dtype=dtype), start)
    for share in (1.0, 0.9, 0.5, 0.1):
        sigma = share * start
        sample = drawn(5, 4, seed=2, dtype=dtype)
        expected = mixture.denoise(sample, FLOW.level(1000.0 * sigma))
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(
            policy.x0(sample, sigma), expected, atol=tolerance, rtol=tolerance
        )


def test_a_gaussian_is_followed_exactly_as_substeps_grow() -> None:
    """The flow of N(m, v) moves each sample along its quantile."""
    mean, variance, now, following = 0.7, 0.36, 1.0, 0.4
    mixture = GaussianMixture(torch.full((1, 2), mean).double(), [variance], [1.0])
    sample = drawn(6, 2, dtype=torch.float64)

    def deviation(sigma: float) -> float:
        return math.sqrt((1 - sigma) ** 2 * variance + sigma**2)

    share = deviation(following) / deviation(now)
    expected = (1 - following) * mean + share * (sample - (1 - now) * mean)
    errors = []
    for substeps in (64, 128, 256, 512):
        policy = seen_from(mixture, sample, now)
        end = roll_out(policy, sample, now, following, shift=3.0, substeps=substeps)
        errors.append(float((end - expected).abs().max()))
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert ratios == pytest.approx([2.0] * 3, rel=0.1)
    assert errors[-1] < 2e-3


@pytest.mark.parametrize("substeps", [1, 7, 128])
def test_points_that_are_all_equal_are_the_plain_step(substeps: int) -> None:
    output, sample = drawn(2, 4, 8, 8, seed=1), drawn(2, 4, 8, 8)
    policy = DxPolicy.from_output(
        output[:, None].expand(-1, 5, -1, -1, -1), sample, 0.9, segment=0.5, shift=3.0
    )
    now, following = FLOW.level(900.0), FLOW.level(600.0)
    expected = step(sample, sample - 0.9 * output, now, following, None, following)
    moved = roll_out(policy, sample, 0.9, 0.6, shift=3.0, substeps=substeps)
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-6)


def some_policies(sample: Tensor) -> list[Policy]:
    outputs = drawn(2, 3, *sample.shape[1:], seed=4, dtype=sample.dtype)
    deviation = torch.full((2, 1, 1, 1), -1.0, dtype=sample.dtype)
    logits = drawn(2, 3, 1, sample.shape[2], seed=5, dtype=sample.dtype)
    return [
        DxPolicy.from_output(outputs, sample, 0.8, segment=0.3, shift=3.0),
        GmPolicy.from_output(outputs, deviation, logits, sample, 0.8),
    ]


def test_one_substep_is_euler_and_the_last_ends_at_clean_data() -> None:
    sample = drawn(2, 4, 6)
    for policy in some_policies(sample):
        moved = roll_out(policy, sample, 0.8, 0.5, shift=3.0, substeps=1)
        expected = sample - 0.3 * velocity(policy, sample, 0.8)
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-6)
        clean = roll_out(policy, sample, 0.8, 0.0, shift=3.0, substeps=1)
        assert torch.equal(clean, policy.x0(sample, 0.8))


def test_substeps_are_of_equal_length_on_the_clock_and_at_least_one() -> None:
    seen: list[float] = []

    class Recording:
        def x0(self, sample: Tensor, sigma: float) -> Tensor:
            seen.append(sigma)
            return sample

    roll_out(Recording(), drawn(1, 2), 1.0, shift_sigma(0.5, 3.0), shift=3.0, substeps=8)
    assert seen == pytest.approx([shift_sigma(u, 3.0) for u in (1.0, 0.875, 0.75, 0.625)])
    del seen[:]
    roll_out(Recording(), drawn(1, 2), 0.5, 0.499, shift=3.0, substeps=8)
    assert seen == [0.5]


def test_a_dx_policy_is_its_points_and_straight_between_them() -> None:
    points = drawn(1, 3, 2)
    policy = DxPolicy(points, start=0.8, segment=0.4, shift=3.0)
    for place, expected in ((0.8, 2), (0.6, 1), (0.4, 0), (0.9, 2), (0.1, 0)):
        x0 = policy.x0(points[:, 0], shift_sigma(place, 3.0))
        torch.testing.assert_close(x0, points[:, expected])
    middle = policy.x0(points[:, 0], shift_sigma(0.5, 3.0))
    torch.testing.assert_close(middle, 0.5 * (points[:, 0] + points[:, 1]))


def test_a_temperature_narrows_the_gaussians_and_sharpens_the_choice() -> None:
    sample = drawn(2, 4, 6)
    outputs, deviation = drawn(2, 3, 4, 6, seed=4), torch.full((2, 1, 1, 1), -1.0)
    logits = drawn(2, 3, 1, 6, seed=5)
    cold = GmPolicy.from_output(outputs, deviation, logits, sample, 0.8, temperature=0.25)
    plain = GmPolicy.from_output(outputs, deviation - math.log(2.0), 4.0 * logits, sample, 0.8)
    torch.testing.assert_close(cold.x0(0.5 * sample, 0.6), plain.x0(0.5 * sample, 0.6))


# --- peers


def test_dx_steps_are_those_of_diffusers_piflow_scheduler() -> None:
    shift, count, points = 5.0, 4, 10
    peer = stock.PiflowScheduler(shift=shift, n_grid=points, final_step_size_scale=0.5)
    peer.set_timesteps(count)
    policy = StepPolicy(kind="dx", components=points, shift=shift, segment=1.0 / (count - 0.5))
    timesteps = tuple(peer.timesteps.double().tolist())
    ours = FewStepScheduler(policy_recipe(SD3, policy, grids=SD3.recipe(timesteps=timesteps).grids))
    ours.set_timesteps(count)
    sample = theirs = drawn(2, 6, 4)  # tokens, channels last
    for index in range(count):
        output = drawn(2, 6, 4 * points, seed=10 + index)
        sample = ours.step(output, ours.timesteps[index], sample).prev_sample
        theirs = peer.step(output, peer.timesteps[index], theirs).prev_sample
        # at the end theirs stops at a clock of 1e-6, ours at clean data
        tolerance = 5e-6 if index + 1 < count else 2e-4
        torch.testing.assert_close(sample, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("policy", [DX, GM], ids=["dx", "gm"])
@pytest.mark.parametrize("ends", [(1.0, 0.95), (0.7, 0.625), (0.625, 0.0)])
def test_a_step_is_the_formula_by_densities_in_float64(
    policy: StepPolicy, ends: tuple[float, float]
) -> None:
    sample = drawn(2, 4, 6, 6, dtype=torch.float64)
    parts = {"means": drawn(2, 3, 4, 6, 6, seed=1, dtype=torch.float64)}
    if policy.kind == "gm":
        parts["logits"] = drawn(2, 3, 1, 6, 6, seed=2, dtype=torch.float64)
        parts["deviation"] = drawn(2, 1, 1, 1, 1, seed=3, dtype=torch.float64) - 1.0
    is_last = ends[1] == 0.0
    temperature = 1.0 if is_last else policy.temperature
    x0_at = reader_by_hand(policy, parts, sample, ends[0], temperature)
    expected = follow_by_hand(policy, x0_at, sample, *ends)
    move = policy_step(policy, wide(parts), sample, planned(*ends), is_last=is_last)
    torch.testing.assert_close(move.moved, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(move.x0, x0_at(sample, ends[0]), atol=1e-9, rtol=1e-9)
    assert move.moved.dtype == torch.float64


# --- layouts


def wide(parts: dict[str, Tensor]) -> Tensor:
    """A policy of pictures as a network with pixels gives it."""
    listed = [parts["means"].flatten(1, 2)]
    if "logits" in parts:
        like = parts["logits"][:, :1, 0]
        listed += [parts["logits"].flatten(1, 2), parts["deviation"][:, 0].expand_as(like)]
    return torch.cat(listed, 1)


@pytest.mark.parametrize("policy", [DX, GM], ids=["dx", "gm"])
def test_tokens_of_four_pixels_are_the_picture(policy: StepPolicy) -> None:
    sample = drawn(2, 4, 6, 6)
    parts = {"means": drawn(2, 3, 4, 6, 6, seed=1)}
    tokens = [packed(parts["means"].flatten(1, 2))]
    if policy.kind == "gm":
        parts["logits"], parts["deviation"] = (
            drawn(2, 3, 1, 6, 6, seed=2),
            torch.full((2, 1, 1, 1, 1), -1.0),
        )
        tokens += [packed(parts["logits"][:, :, 0]), torch.full((2, 9, 1), -1.0)]
    whole = policy_step(policy, wide(parts), sample, planned(0.8, 0.7), is_last=False)
    cut = policy_step(
        policy, torch.cat(tokens, -1), packed(sample), planned(0.8, 0.7), is_last=False
    )
    assert_same(unpacked(cut.moved, 6, 6), whole.moved)
    assert_same(unpacked(cut.x0, 6, 6), whole.x0)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("policy", "shape", "said"),
    [
        (DX, (1, 8, 5, 5), "gave 8 channels for samples of 4, but a 'dx' policy of 3 components"),
        (GM, (1, 12, 5, 5), r"has 3 \* \(4 \+ pixels of a token\) \+ 1; use the recipe"),
        (GM, (1, 17, 5, 5), "a 'gm' policy of 3 components has"),
        (GM, (1, 22, 5, 5), "gave 22 channels"),
        (DX, (1, 12, 5, 6), "a policy has the sample's shape with more channels"),
        (DX, (2, 4, 5, 5), "a policy has the sample's shape with more channels"),
        (DX, (1, 12, 25), "a policy has the sample's shape with more channels"),
    ],
)
def test_outputs_that_are_no_such_policy_are_refused(
    policy: StepPolicy, shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ShapeError, match=said):
        policy_step(policy, drawn(*shape), drawn(1, 4, 5, 5), planned(0.8, 0.7), is_last=False)


def test_a_network_without_a_head_is_refused_by_the_scheduler() -> None:
    scheduler = FewStepScheduler(policy_recipe(SD3, GM))
    sample = drawn(1, 4, 8, 8)
    with pytest.raises(PipelineError, match="is 'policy', but the network gave one velocity"):
        scheduler.step(sample, 1000.0, sample)
    scheduler.refine_x0 = lambda x0, planned: x0
    with pytest.raises(PipelineError, match="no single prediction to refine"):
        scheduler.step(drawn(1, 16, 8, 8), 1000.0, sample)


def test_policies_of_other_shapes_than_the_sample_are_refused() -> None:
    with pytest.raises(ShapeError, match="a dx policy has 2 points or more, got 1"):
        DxPolicy.from_output(drawn(1, 1, 4), drawn(1, 4), 0.5, segment=0.2, shift=1.0)
    with pytest.raises(ShapeError, match=r"got \(1, 2, 4\) and \(1, 5\)"):
        DxPolicy.from_output(drawn(1, 2, 4), drawn(1, 5), 0.5, segment=0.2, shift=1.0)
    with pytest.raises(ShapeError, match="a gm policy has logits"):
        GmPolicy.from_output(drawn(1, 2, 4), drawn(1, 1, 1), drawn(1, 3, 1), drawn(1, 4), 0.5)
