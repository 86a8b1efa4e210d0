"""Named, complete configurations with what they were measured to reach.

`python -m fewstep.trainer NAME` runs one; every field can be overridden on the command line.
"""

from dataclasses import dataclass

from fewstep.trainer.config import TrainConfig


@dataclass(frozen=True, slots=True)
class NamedRecipe:
    """A configuration people can call by name.

    Attributes:
        summary: One line for `--list`.
        paper: Where the method comes from.
        needs: Data, prompts or reward the run needs.
        result: What it reached, measured where.
        config: The configuration.
    """

    summary: str
    paper: str
    needs: str
    result: str
    config: TrainConfig


RECIPES: dict[str, NamedRecipe] = {
    "digits-4step": NamedRecipe(
        summary="the shipped digits teachers in 4 steps",
        paper="SFD 2409.19681, DMD2 2405.14867",
        needs="nothing (prompts are shipped)",
        result="",
        config=TrainConfig(max_sequence_length=1),
    ),
}
