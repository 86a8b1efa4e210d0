"""Frechet distance between two sets of features, numerically stable in float64.

The textbook form takes the square root of a non-symmetric product, which yields imaginary parts
and fails on covariances without full rank. Here both covariances are factored by symmetric
eigen-decomposition, C = F F^T, and the cross term is the sum of the singular values of F1^T F2:
real and non-negative by construction, with no square root of rounding errors.
"""

import numpy as np

from fewstep.errors import ConfigError, ShapeError

NEGATIVE_TOLERANCE = 1e-6
"""Eigenvalues down to -this, relative to the largest, are rounding; below, no covariance."""


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """Squared 2-Wasserstein distance between two Gaussians.

        |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1^1/2 cov2 cov1^1/2)^1/2)

    Zero when the two are equal, symmetric in its arguments, unchanged by a common rotation.
    Covariances may have any rank.

    Args:
        mean1: Shape (D,).
        cov1: Shape (D, D), symmetric, positive semi-definite up to rounding.
        mean2: Shape (D,).
        cov2: Shape (D, D), as cov1.

    Returns:
        The distance, >= 0, in squared units of the features. Computed in float64.

    Raises:
        ShapeError: Means and covariances do not fit each other.
        ConfigError: A value is not finite, or a covariance has negative eigenvalues.

    Source:
        Dowson and Landau 1982; Heusel et al. 2017 (FID), arXiv:1706.08500, eq. 6.
    """
    first, second = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    size = first.size
    if not (
        first.shape == second.shape == (size,) and np.shape(cov1) == np.shape(cov2) == (size, size)
    ):
        raise ShapeError(
            f"means of shape {np.shape(mean1)} and {np.shape(mean2)} came with covariances of "
            f"shape {np.shape(cov1)} and {np.shape(cov2)}; wanted (D,) and (D, D)"
        )
    root1, root2 = _root(cov1), _root(cov2)
    cross = np.linalg.svd(root1.T @ root2, compute_uv=False).sum()
    spread = np.square(root1).sum() + np.square(root2).sum()  # the two traces
    shift = np.square(first - second).sum()
    if not np.isfinite(shift):
        raise ConfigError("a mean holds NaN or infinity; check the images the features came from")
    return float(shift + max(0.0, spread - 2.0 * cross))


def _root(cov: np.ndarray) -> np.ndarray:
    """F with F F^T = cov, shape (D, D); directions without variance are exactly zero."""
    cov = np.asarray(cov, np.float64)
    if not np.isfinite(cov).all():
        raise ConfigError(
            "a covariance holds NaN or infinity; check the images the features came from"
        )
    values, vectors = np.linalg.eigh((cov + cov.T) / 2.0)
    largest = np.abs(values).max(initial=0.0)
    if values.min(initial=0.0) < -NEGATIVE_TOLERANCE * largest:
        raise ConfigError(
            f"a covariance has the eigenvalue {values.min():g} beside {largest:g}; "
            "a covariance has none below 0"
        )
    rounding = len(values) * np.finfo(np.float64).eps * largest
    return vectors * np.sqrt(np.where(values > rounding, values, 0.0))


def frechet_from_features(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two sets of features.

    Biased upward by finite samples, in proportion to 1/N + 1/M: compare figures of equal sizes.

    Args:
        a: Shape (N, D), N >= 2.
        b: Shape (M, D), M >= 2.

    Returns:
        See `frechet_distance`; covariances with N - 1 in the denominator.

    Raises:
        ShapeError: Not two-dimensional, different D, or fewer than two rows.
        ConfigError: A feature is not finite.
    """
    for features in (a, b):
        if np.ndim(features) != 2 or len(features) < 2:
            raise ShapeError(
                f"got features of shape {np.shape(features)}; wanted (N, D) with N >= 2"
            )
    return frechet_distance(*mean_and_cov(a), *mean_and_cov(b))


def mean_and_cov(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))
