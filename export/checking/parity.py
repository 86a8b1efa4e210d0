"""How equal two engines are: per component, per step of a trajectory, per picture."""

import math
from collections.abc import Sequence

import numpy as np

from fewstep.export.checking.drawing import Case, Drawing
from fewstep.export.checking.limits import EQUAL_DB, NO_NUMBER, Limits, finite
from fewstep.metrics.parity import worst_parity
from fewstep.runtime.manifest import Measured
from fewstep.runtime.session import Feeds, Session


def compare_component(
    name: str,
    where: str,
    sessions: tuple[Session, Session],
    feeds: Sequence[Feeds],
    limit: float | None,
) -> tuple[Measured, ...]:
    """Both sessions on the same inputs.

    Args:
        name: Of the component.
        where: Case and shape, for people.
        sessions: Reference and candidate.
        feeds: Inputs of each call; what the candidate lacks is an error.
        limit: Of the relative error.

    Returns:
        The largest error, and the largest relative to the reference's largest value.
    """
    largest, relative = 0.0, 0.0
    for given in feeds:
        wanted, found = (session.run(_cast(given, session)) for session in sessions)
        for output in wanted:
            largest = max(largest, difference(wanted[output], found[output]))
            relative = max(relative, relative_difference(wanted[output], found[output]))
    return (
        Measured(what=name, where=where, value=largest, unit="max error"),
        Measured(what=name, where=where, value=relative, unit="relative error", limit=limit),
    )


def compare_steps(
    case: Case, wanted: Drawing, found: Drawing, limits: Limits
) -> tuple[Measured, ...]:
    """Clean latents after every step, each engine on its own path."""
    measured: list[Measured] = []
    last = len(wanted.steps) - 1
    for index, (first, second) in enumerate(zip(wanted.steps, found.steps, strict=True)):
        where = f"{case.name}, step {index + 1} of {last + 1}"
        error = difference(first, second)
        share = relative_rms(first, second)
        limit = limits.latents if index == last else None
        measured += [
            Measured(what="latents", where=where, value=error, unit="max error", limit=limit),
            Measured(what="latents", where=where, value=share, unit="relative error"),
        ]
    return tuple(measured)


def compare_pictures(
    case: Case, wanted: np.ndarray, found: np.ndarray, limits: Limits
) -> tuple[Measured, ...]:
    """The worst picture of a case; of clips, the worst of their pictures."""
    wanted, found = stills(wanted), stills(found)
    parity = worst_parity(wanted, found)
    largest = float(np.abs(wanted.astype(np.int16) - found.astype(np.int16)).max())
    psnr_db = EQUAL_DB if math.isinf(parity.psnr_db) else parity.psnr_db
    where = f"{case.name}, {in_words(case)}"
    return (
        Measured(what="image", where=where, value=largest, unit="max error of 255"),
        Measured(what="image", where=where, value=psnr_db, unit="dB", limit=limits.psnr_db),
        Measured(what="image", where=where, value=parity.ssim, unit="SSIM", limit=limits.ssim),
    )


def stills(pixels: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3); the pictures of clips (B, F, H, W, 3) one after the other."""
    return pixels.reshape(-1, *pixels.shape[-3:])


def in_words(case: Case) -> str:
    """Its size, for people."""
    frames = "" if case.frames is None else f", {case.frames} frames"
    return f"{case.size[0]}x{case.size[1]}{frames}"


def shape_of(feeds: Feeds) -> str:
    """The first input's shape, for people."""
    name, value = next(iter(feeds.items()))
    return f"{name} {'x'.join(str(n) for n in value.shape) or 'scalar'}"


def difference(wanted: np.ndarray, found: np.ndarray) -> float:
    """The largest absolute difference; `NO_NUMBER` where either is NaN or infinite."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return finite(float(np.abs(wanted.astype(np.float64) - found.astype(np.float64)).max()))


def relative_difference(wanted: np.ndarray, found: np.ndarray) -> float:
    """The largest absolute difference, relative to the largest absolute value that is wanted."""
    gap = difference(wanted, found)
    return gap if gap >= NO_NUMBER else finite(gap / max(float(np.abs(wanted).max()), 1e-6))


def relative_rms(wanted: np.ndarray, found: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of what is wanted; or `NO_NUMBER`."""
    with np.errstate(invalid="ignore"):
        gap = np.linalg.norm((wanted.astype(np.float64) - found).ravel())
        return finite(float(gap / max(np.linalg.norm(wanted.ravel()), 1e-12)))


def _cast(feeds: Feeds, session: Session) -> dict[str, np.ndarray]:
    """Inputs in the element types of a session's graph: folders may differ in precision."""
    types = {tensor.name: tensor.dtype for tensor in session.graph.inputs}
    return {name: np.asarray(value, types[name]) for name, value in feeds.items()}
