"""What a user may say about a model's edge."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeSettings:
    """Settings of an edge; a family that a setting means nothing to refuses it.

    Attributes:
        max_sequence_length: Text tokens; 0 is what the pipeline takes when it is called.
        embedded_guidance: The guidance scale that is an input of the network, for models that were
            distilled with one (FLUX.1-dev); None is the pipeline's own default.
    """

    max_sequence_length: int = 0
    embedded_guidance: float | None = None
