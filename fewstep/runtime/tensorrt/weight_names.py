"""Names under which an exported graph holds a network's parameters."""

from collections.abc import Container

from fewstep.runtime.weight_forms import stored_names

PART = "model."
"""An exported part wraps its network, so every parameter's name begins so in the graph."""


def held_names(parameter: str, known: Container[str]) -> tuple[str, ...]:
    """The names of a parameter in a graph.

    Args:
        parameter: As the network has it ("proj_out.weight"), or as the graph ("model.proj_out...").
        known: Names in the graph.

    Returns:
        Several where the graph holds it in several forms (`weight_forms`); empty where it is not.
    """
    return stored_names(f"{PART}{parameter}", known) or stored_names(parameter, known)
