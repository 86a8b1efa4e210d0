"""fewstep: a few-step diffusion model is weights plus a recipe, and the recipe travels in the file.

Names resolve when they are first used, so importing fewstep costs milliseconds and needs no extra:

    from fewstep import FewStepPipeline

    pipeline = FewStepPipeline.from_pretrained(base, adapter="adapter.safetensors")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewstep.extras import missing_extra

if TYPE_CHECKING:
    from fewstep.adapters import AdapterReport as AdapterReport
    from fewstep.adapters import inspect_adapter as inspect_adapter
    from fewstep.errors import FewstepError as FewstepError
    from fewstep.pipeline import FewStepPipeline as FewStepPipeline
    from fewstep.recipe import FewStepRecipe as FewStepRecipe
    from fewstep.runtime.few_step_runtime import FewStepRuntime as FewStepRuntime
    from fewstep.runtime.fused_runtime import FusedRuntime as FusedRuntime
    from fewstep.schedulers import FewStepScheduler as FewStepScheduler

__version__ = "0.1.0"

HOMES = {
    "AdapterReport": "fewstep.adapters",
    "FewStepPipeline": "fewstep.pipeline",
    "FewStepRecipe": "fewstep.recipe",
    "FewStepRuntime": "fewstep.runtime.few_step_runtime",
    "FewStepScheduler": "fewstep.schedulers",
    "FewstepError": "fewstep.errors",
    "FusedRuntime": "fewstep.runtime.fused_runtime",
    "inspect_adapter": "fewstep.adapters",
}
"""Public name -> the module that defines it."""

__all__ = [
    "AdapterReport",
    "FewStepPipeline",
    "FewStepRecipe",
    "FewStepRuntime",
    "FewStepScheduler",
    "FewstepError",
    "FusedRuntime",
    "__version__",
    "inspect_adapter",
]


def __getattr__(name: str) -> Any:
    """A public name, imported now (PEP 562).

    Raises:
        AttributeError: No such name.
        MissingExtraError: The name needs an optional dependency that is not installed.
    """
    if name not in HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    try:
        value = getattr(import_module(HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from error
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
