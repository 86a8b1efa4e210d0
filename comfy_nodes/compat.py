"""What differs between ComfyUI releases, asked of ComfyUI itself, not guessed from a version."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def accepted(make: Callable[..., T], /, *given: Any, **options: Any) -> T:
    """Call with the options this ComfyUI knows; newer ones are left out where it does not.

    Args:
        make: `io.Schema`, `io.Int.Input`, ...
        given: Positional arguments.
        options: Keyword arguments, of which some may be newer than this ComfyUI.
    """
    parameters = inspect.signature(make).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return make(*given, **options)
    return make(*given, **{name: value for name, value in options.items() if name in parameters})
