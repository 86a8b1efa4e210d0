"""`fewstep doctor train RECIPE [--field value ...]`: examine a run before it starts."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from fewstep.errors import ConfigError, FewstepError
from fewstep.trainer.config import TrainConfig

DESCRIPTION = """Examine a training run before it starts.

Says what it costs in memory and time (and how far off the estimate is), draws the teacher in the
student's steps and in many, looks at its latents, finds where guidance leads away from the
teacher's own pictures, proposes a grid from how its trajectory bends, and checks that every role
learns from its own update only.

  fewstep doctor train digits-4step
  fewstep doctor train image-4step --model ./my-model --data.prompts prompts.txt
  fewstep doctor train runs/mine/config.json --no-verify

The report (teacher.png, doctor.json) goes to RUN/doctor. --no-verify skips the one real step.
Exit status: 0 fine, 3 something would spoil the run."""
FOUND = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, verify = "--json" in arguments, "--no-verify" not in arguments
    arguments = [a for a in arguments if a not in ("--json", "--no-verify")]
    console = Console(stderr=True)
    try:
        config = read_config(arguments)
        from fewstep.trainer.doctor.report import examine, to_text

        with console.status("examining"):
            diagnosis = examine(config, config.out / "doctor", verify=verify)
    except FewstepError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    text = json.dumps(diagnosis.to_dict(), indent=1) if as_json else to_text(diagnosis)
    sys.stdout.write(text + "\n")
    return FOUND if diagnosis.has_errors else 0


def read_config(arguments: list[str]) -> TrainConfig:
    """The config of a recipe with overrides, or of a config.json.

    Raises:
        ConfigError: The file cannot be read or is no config.
    """
    if arguments and arguments[0].endswith(".json"):
        try:
            data = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{arguments[0]} cannot be read as JSON ({error})") from error
        return TrainConfig.from_dict(data)
    from fewstep.trainer.recipes import RECIPES

    configs = {name: (recipe.summary, recipe.config) for name, recipe in RECIPES.items()}
    return tyro.extras.overridable_config_cli(
        configs,
        args=arguments,
        prog="fewstep doctor train",
        description=DESCRIPTION,
        config=(tyro.conf.AvoidSubcommands,),
    )


if __name__ == "__main__":
    sys.exit(main())
