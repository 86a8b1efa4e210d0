"""`python -m fewstep.trainer RECIPE [--field value ...]`."""

import logging
import os
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.table import Column, Table

from fewstep.errors import FewstepError
from fewstep.trainer.config import TrainConfig
from fewstep.trainer.recipes import RECIPES

DESCRIPTION = """Distil a diffusion or flow teacher into a few-step LoRA adapter.

Pick a recipe, then override what you like:

  python -m fewstep.trainer --list
  python -m fewstep.trainer digits-4step
  python -m fewstep.trainer dmd2 --out runs/dmd2 --method.match.critic-updates 5
  python -m fewstep.trainer image-4step --model ./my-sd3-fine-tune --data.prompts prompts.txt

An interrupted run continues when the same command is given again. Several GPUs: put `accelerate
launch -m` or `torchrun --nproc-per-node N -m` in place of `python -m` (docs/scale.md)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 2 user error, 130 interrupted)."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes on optional parts are not ours
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True)
    if "--list" in arguments:
        Console().print(recipe_table())
        return 0
    is_quiet = "--quiet" in arguments
    arguments = [a for a in arguments if a != "--quiet"]
    logging.basicConfig(level=logging.WARNING if is_quiet else logging.INFO, format="%(message)s")
    configs = {name: (recipe.summary, recipe.config) for name, recipe in RECIPES.items()}
    try:
        config = tyro.extras.overridable_config_cli(
            configs,
            args=arguments,
            prog="fewstep.trainer",
            description=DESCRIPTION,
            config=(tyro.conf.AvoidSubcommands,),  # the recipe has chosen the method
        )
        return run(config, console, is_quiet=is_quiet)
    except FewstepError as error:
        rank = os.environ.get("RANK", "0")  # without a launcher there is none
        who = "" if rank == "0" else f"process {rank}: "
        console.print(
            f"{who}error: {error}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2


def run(config: TrainConfig, console: Console, *, is_quiet: bool) -> int:
    """Train with a progress bar and say where the result is; one of several processes speaks."""
    from fewstep.trainer.launch import is_one_of_several, join, leave
    from fewstep.trainer.loop import train
    from fewstep.trainer.parallel import Processes
    from fewstep.trainer.progress import TrainProgress

    is_several = is_one_of_several(os.environ)
    processes = join(os.environ, config.device) if is_several else Processes()
    if not processes.is_main:
        logging.getLogger().setLevel(logging.ERROR)
        is_quiet = True
        console = Console(stderr=True, quiet=True)
    with TrainProgress(console, is_quiet=is_quiet) as progress:
        result = train(config, progress.report, processes)
    leave(processes)
    if result.was_interrupted:
        console.print(f"stopped after step {result.steps}; run the same command to go on")
        return 130
    console.print(f"adapter: {result.adapter}")
    for name, value in result.scores.items():
        console.print(f"  {name.removeprefix('eval/')}: {value:.4g}")
    return 0


def recipe_table() -> Table:
    """What `--list` prints."""
    table = Table(
        Column("recipe", no_wrap=True),
        "what it does",
        "needs",
        "NFE",
        "makes",
        "measured",
        "source",
    )
    for name, recipe in RECIPES.items():
        steps = ", ".join(str(count) for count in recipe.config.grid.all_steps)
        artefact = recipe.config.method.facts.artefact
        table.add_row(
            name, recipe.summary, recipe.needs, steps, artefact, recipe.result, recipe.paper
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
