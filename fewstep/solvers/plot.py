"""A picture of a recipe's grids beside the even ones."""

import os
from pathlib import Path

from fewstep.recipe import FewStepRecipe
from fewstep.solvers.flow_frame import even_levels


def save_grid_plot(file: Path, recipe: FewStepRecipe) -> None:
    """Sigma over steps, one panel per step count, with the schedule's even grid in grey.

    Args:
        file: PNG to write, whole or not at all.
        recipe: Whose grids.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    schedule, grids = recipe.base.schedule.build(), recipe.grids
    figure, axes = pyplot.subplots(
        1, len(grids), figsize=(3.2 * len(grids), 3.0), squeeze=False, sharey=True
    )
    for axis, grid in zip(axes[0], grids, strict=True):
        even = [level.sigma for level in even_levels(schedule, grid.num_steps)]
        axis.plot(even, "o-", color="0.7", label="even", ms=4)
        axis.plot(grid.sigmas, "o-", color="C0", label="found", ms=4)
        axis.set(title=f"{grid.num_steps} calls", xlabel="call")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("sigma")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=110, format="png")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
        pyplot.close(figure)
