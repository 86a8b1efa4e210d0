"""How different the pictures of one prompt are from each other."""

import numpy as np

from fewstep.errors import ShapeError


def intra_prompt_diversity(features: np.ndarray, groups: np.ndarray) -> float:
    """Mean distance between two pictures of the same prompt, averaged over prompts.

    Zero when every prompt always gives the same picture. Each prompt counts once, however many
    pictures it has.

    Args:
        features: Shape (N, D).
        groups: Shape (N,), which prompt each row belongs to; at least two rows of each.

    Returns:
        Mean Euclidean distance, in units of the features. Computed in float64.

    Raises:
        ShapeError: Shapes do not fit or a group has a single row.
    """
    groups = np.asarray(groups)
    if np.ndim(features) != 2 or groups.shape != (len(features),) or len(features) == 0:
        raise ShapeError(
            f"got features of shape {np.shape(features)} and groups of shape {groups.shape}; "
            "wanted (N, D) and (N,)"
        )
    labels, counts = np.unique(groups, return_counts=True)
    if counts.min() < 2:
        raise ShapeError(
            f"group {labels[counts.argmin()]} has one picture; diversity needs two of each prompt"
        )
    features = np.asarray(features, np.float64)
    return float(np.mean([_mean_distance(features[groups == label]) for label in labels]))


def _mean_distance(points: np.ndarray) -> float:
    """Over all pairs of rows; by differences, so that equal rows are exactly 0 apart."""
    count = len(points)
    rows = (np.linalg.norm(points[i + 1 :] - points[i], axis=1).sum() for i in range(count - 1))
    return sum(rows) / (count * (count - 1) / 2)
