"""Phase experts by ComfyUI's public interface alone: one run per phase, one after another."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers  # pyright: ignore[reportMissingImports]
from torch import Tensor

from fewstep.comfy_nodes.expert_phases import phase_runs, phases_of_steps
from fewstep.errors import PipelineError
from fewstep.recipe import FewStepRecipe

Callback = Callable[[int, Tensor, Tensor, int], None]
"""(step, x0, sample, number of steps)."""


class PhaseByPhaseGuider(comfy.samplers.CFGGuider):
    """One `CFGGuider.sample` per phase; the sample goes from one to the next with its noise in it.

    A sampler of ours goes on with its noise stream; a stock stochastic one begins it again.

    Args:
        models: MODEL of each phase, noisiest first.
        recipe: With as many experts.
    """

    def __init__(self, models: Sequence[Any], recipe: FewStepRecipe) -> None:
        super().__init__(models[0])
        self._models, self._recipe = tuple(models), recipe

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callback | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        """As `CFGGuider.sample`.

        Raises:
            PipelineError: There is a mask, which a second run would take for a clean picture's.
        """
        if denoise_mask is not None:
            raise PipelineError(
                'A mask needs experts "one loop": with one run per phase, ComfyUI would keep the '
                "noise of the phase before where the mask keeps the picture."
            )
        if sigmas.shape[-1] == 0:
            return latent_image
        phases = phases_of_steps(self._recipe, [float(sigma) for sigma in sigmas])
        for run in phase_runs(phases):
            guider = comfy.samplers.CFGGuider(self._models[run.phase])
            guider.original_conds = self.original_conds
            guider.set_cfg(self.cfg)
            latent_image = guider.sample(
                noise,
                latent_image,
                sampler,
                sigmas[run.first : run.end + 1],
                None,
                _counting(callback, run.first, len(phases)),
                disable_pbar,
                seed,
            )
            noise = noise * 0.0
        return latent_image


def _counting(callback: Callback | None, first: int, total: int) -> Callback | None:
    if callback is None:
        return None
    return lambda step, x0, sample, _: callback(first + step, x0, sample, total)
