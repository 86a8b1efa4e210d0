"""A step of a policy: from the wide output of a network to the sample at the step's end.

A network gives its policy in the layout of its samples, with more channels: (B, W, h, w) for SD3,
(B, tokens, W) for FLUX and Qwen-Image. With N components and C channels, in this order:

    dx   N times C velocities                                                   W = N C
    gm   K times C means, K times G log weights, one log standard deviation     W = K (C + G) + 1

G is how many pixels share a token (4 where FLUX packs 2 x 2; its channels are C / 4 major), 1 where
a token is a pixel: every pixel has weights of its own.
"""

from dataclasses import dataclass

from torch import Tensor

from fewstep.errors import PipelineError, ShapeError
from fewstep.heads.policy import DxPolicy, GmPolicy, Policy, roll_out
from fewstep.recipe import StepPolicy
from fewstep.trajectory import PlannedStep


@dataclass(frozen=True, slots=True)
class PolicyMove:
    """What a step gives.

    Attributes:
        moved: The sample at the step's end.
        x0: Clean data as the policy sees it from the step's start.
    """

    moved: Tensor
    x0: Tensor


def policy_step(
    policy: StepPolicy, output: Tensor, sample: Tensor, planned: PlannedStep, *, is_last: bool
) -> PolicyMove:
    """Follow the policy that a network gave, from the step's level to the following one.

    Args:
        policy: How the output is read.
        output: What the network said. Shape of `sample` with more channels, any float dtype.
        sample: The noisy sample, float32 or wider. Shape (B, C, ...) or (B, tokens, C).
        planned: The step.
        is_last: Whether the grid ends with it; a temperature is not applied there.

    Raises:
        PipelineError: The output is as narrow as a sample: the network has no policy head.
        ShapeError: It does not hold a policy of this kind.
    """
    if output.shape == sample.shape:
        raise PipelineError(
            "this recipe's sampler is 'policy', but the network gave one velocity and no policy; "
            "load the adapter with FewStepPipeline, which installs its wider output layer"
        )
    axis = _channel_axis(output, sample)
    now = planned.level.sigma
    wide = output.to(sample.dtype).movedim(axis, 1)
    narrow = sample.movedim(axis, 1)
    groups = _groups(policy, wide.shape[1], narrow.shape[1])
    flat = narrow.reshape(len(narrow), narrow.shape[1] // groups, groups, -1)
    if policy.kind == "dx":
        made = _dx(policy, wide, flat, now)
    else:
        made = _gm(policy, wide, flat, now, 1.0 if is_last else policy.temperature)
    x0 = made.x0(flat, now)
    moved = roll_out(
        made, flat, now, planned.following.sigma, shift=policy.shift, substeps=policy.substeps
    )

    def as_given(value: Tensor) -> Tensor:
        return value.reshape(narrow.shape).movedim(1, axis).contiguous()  # pipelines take views

    return PolicyMove(as_given(moved), as_given(x0))


def check_not_refined(refine: object) -> None:
    """Refuse a refinement of x0, of which a policy has many in one step.

    Raises:
        PipelineError: There is one.
    """
    if refine is not None:
        raise PipelineError(
            "this recipe's sampler is 'policy', whose steps have no single prediction to refine; "
            "leave refine_x0 out"
        )


def _dx(policy: StepPolicy, wide: Tensor, sample: Tensor, sigma: float) -> Policy:
    assert policy.segment is not None  # StepPolicy.__post_init__
    velocities = wide.reshape(len(wide), policy.components, *sample.shape[1:])
    return DxPolicy.from_output(
        velocities, sample, sigma, segment=policy.segment, shift=policy.shift
    )


def _gm(
    policy: StepPolicy, wide: Tensor, sample: Tensor, sigma: float, temperature: float
) -> Policy:
    batch, channels, groups, _ = sample.shape
    count = policy.components
    sizes = [count * channels * groups, count * groups, 1]
    means, logits, log_deviation = wide.flatten(2).split(sizes, 1)
    return GmPolicy.from_output(
        means.reshape(batch, count, *sample.shape[1:]),
        log_deviation[:, :, None, None],
        logits.reshape(batch, count, 1, groups, -1),
        sample,
        sigma,
        temperature=temperature,
    )


def _groups(policy: StepPolicy, width: int, channels: int) -> int:
    """How many pixels share a token; a "dx" policy is the same for all."""
    count = policy.components
    if policy.kind == "dx":
        if width != count * channels:
            raise _is_of_another_width(policy, width, channels, str(count * channels))
        return 1
    groups, rest = divmod(width - 1 - count * channels, count)
    if rest or groups < 1 or channels % groups:
        raise _is_of_another_width(
            policy, width, channels, f"{count} * ({channels} + pixels of a token) + 1"
        )
    return groups


def _channel_axis(output: Tensor, sample: Tensor) -> int:
    differing = [
        axis
        for axis, (wide, narrow) in enumerate(zip(output.shape, sample.shape, strict=False))
        if wide != narrow
    ]
    if output.ndim != sample.ndim or len(differing) != 1 or differing[0] == 0:
        raise ShapeError(
            f"the network gave shape {tuple(output.shape)} for a sample of {tuple(sample.shape)}; "
            "a policy has the sample's shape with more channels"
        )
    return differing[0]


def _is_of_another_width(policy: StepPolicy, width: int, channels: int, wanted: str) -> ShapeError:
    return ShapeError(
        f"the network gave {width} channels for samples of {channels}, but a {policy.kind!r} "
        f"policy of {policy.components} components has {wanted}; use the recipe in the file"
    )
