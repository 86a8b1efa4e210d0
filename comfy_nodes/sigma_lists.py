"""Lists of timesteps or sigmas as people write them, and runs of one list in another. No ComfyUI.

A MODEL's `model_sampling` turns timesteps into its sigmas; it is passed in.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from fewstep.comfy_nodes.model_levels import (
    SAME_SIGMA,
    FlowLevels,
    ModelLevels,
    levels_of_model,
)
from fewstep.errors import ConfigError
from fewstep.noise_schedule import shift_sigma

TIMESTEPS, SIGMAS, UNSHIFTED = "timesteps", "sigmas", "unshifted + shift"
KINDS = (TIMESTEPS, SIGMAS, UNSHIFTED)
ZERO, FIRST_TRAINED, AS_LISTED = "zero", "first training step", "as listed"
TERMINALS = (ZERO, FIRST_TRAINED, AS_LISTED)
NEARLY_CLEAN = 0.1
"""Sigma below which a list may end."""


def listed_sigmas(
    text: str, model_sampling: Any, *, kind: str, shift: float, terminal: str
) -> tuple[float, ...]:
    """A list as people write it, as SIGMAS of a MODEL.

    Args:
        text: Numbers between commas, spaces or new lines; brackets are ignored.
        model_sampling: The MODEL's.
        kind: "timesteps" (0 to 1000), "sigmas" (as ComfyUI counts them) or "unshifted + shift" (a
            flow's sigmas before the shift).
        shift: Of the last kind; 0 takes the MODEL's.
        terminal: How it ends: "zero", "first training step" (as TCD does) or "as listed". A list
            that ends at that already stays as it is.

    Returns:
        N + 1 values, strictly falling.

    Raises:
        ConfigError: Not numbers, not falling, or more noise than the MODEL knows.
    """
    values = parse_numbers(text)
    if kind == TIMESTEPS and terminal != AS_LISTED and values[-1] == 0.0 and len(values) > 1:
        values = values[:-1]  # it says where the list ends, which `terminal` says too
    levels = levels_of_model(model_sampling)
    sigmas = _as_sigmas(values, levels, model_sampling, kind=kind, shift=shift)
    ending = {ZERO: 0.0, FIRST_TRAINED: float(model_sampling.sigma_min), AS_LISTED: None}[terminal]
    if ending is not None and not _same(sigmas[-1], ending):
        sigmas = (*sigmas, ending)
    _check(sigmas, float(model_sampling.sigma_max))
    return sigmas


def parse_numbers(text: str) -> tuple[float, ...]:
    """The numbers in a text.

    Raises:
        ConfigError: Something in it is no number, or there are none.
    """
    words = [word for word in re.split(r"[\s,;\[\]()]+", text) if word]
    if not words:
        raise ConfigError('The list is empty; write numbers, such as "999, 749, 499, 249".')
    try:
        return tuple(float(word) for word in words)
    except ValueError as error:
        wrong = next(word for word in words if not _is_number(word))
        raise ConfigError(f"'{wrong}' is not a number; write numbers and commas.") from error


def find_run(whole: Sequence[float], part: Sequence[float]) -> int | None:
    """Where a part of a list of sigmas begins in it; None if it is no part.

    Args:
        whole: N + 1 falling values.
        part: Two or more; compared as float32 numbers are.
    """
    for begin in range(len(whole) - len(part) + 1):
        if all(map(_same, whole[begin : begin + len(part)], part)):
            return begin
    return None


def sigma_table(sigmas: Sequence[float], model_sampling: Any) -> str:
    """The steps of a list, one a line: timestep as the network is told it, sigma."""
    levels = levels_of_model(model_sampling)
    lines = ["step  timestep  sigma"]
    for step, sigma in enumerate(sigmas[:-1], start=1):
        lines.append(f"{step:>4}  {levels.level(sigma).timestep:>8.1f}  {sigma:.4f}")
    lines.append(f" end            {sigmas[-1]:.4f}")
    return "\n".join(lines)


def numbers(values: Sequence[float]) -> str:
    """For messages."""
    return ", ".join(f"{value:.4g}" for value in values)


def _as_sigmas(
    values: tuple[float, ...],
    levels: ModelLevels,
    model_sampling: Any,
    *,
    kind: str,
    shift: float,
) -> tuple[float, ...]:
    if kind == SIGMAS:
        return values
    is_flow = isinstance(levels, FlowLevels)
    if kind == UNSHIFTED:
        if not is_flow:
            raise ConfigError(
                'MODEL is no flow model, and only those are shifted; set kind to "timesteps".'
            )
        _check_at_most(values, 1.0, "Unshifted sigma")
        return tuple(_shifted(value, model_sampling, shift) for value in values)
    top = 1000.0 if is_flow else len(model_sampling.sigmas) - 1.0
    _check_at_most(values, top, "Timestep")
    return tuple(map(levels.sigma_at, values))


def _shifted(value: float, model_sampling: Any, shift: float) -> float:
    if shift:
        return shift_sigma(value, shift)
    return float(model_sampling.percent_to_sigma(1.0 - value))


def _check_at_most(values: Sequence[float], top: float, what: str) -> None:
    for entry, value in enumerate(values, start=1):
        if not 0.0 <= value <= top:
            raise ConfigError(
                f"{what} {value:g} (entry {entry}) is not between 0 and {top:g}; is kind right?"
            )


def _check(sigmas: Sequence[float], most: float) -> None:
    for entry, (now, following) in enumerate(zip(sigmas, sigmas[1:], strict=False), start=2):
        if not now > following:
            raise ConfigError(
                f"Sigmas must fall: {now:.4g} is followed by {following:.4g} (entry {entry})."
            )
    _check_at_most(sigmas, most * (1.0 + SAME_SIGMA), "Sigma")
    if len(sigmas) < 2 or sigmas[-1] >= NEARLY_CLEAN:
        raise ConfigError(f"The list ends at {sigmas[-1]:g}; add 0 or choose a terminal.")


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=SAME_SIGMA, abs_tol=1e-9)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
