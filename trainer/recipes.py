"""Named, complete configurations with what they were measured to reach.

`python -m fewstep.trainer NAME` runs one; every field can be overridden on the command line. Every
method is one, on the digits teacher; the presets for full-size models are in `presets.py`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fewstep.trainer.config import EvaluationConfig, GridConfig, LoraConfig, TrainConfig
from fewstep.trainer.methods.dmd2 import Dmd2
from fewstep.trainer.methods.method import Method
from fewstep.trainer.methods.methods import METHODS
from fewstep.trainer.methods.sfd import TrajectoryConfig
from fewstep.trainer.methods.shared import MatchConfig
from fewstep.trainer.methods.warm_dmd2 import WarmDmd2
from fewstep.trainer.presets import PRESETS


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


MEASURED = "docs/methods.md, where it is listed"

# The student sees few timesteps only, so what depends on time may change too.
DIGITS_TARGETS = {
    "digits-sd3": (
        r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$",
        r"\.(ff|ff_context)\.net\.",
        r"norm1(_context)?\.linear$",
        r"timestep_embedder",
        r"^proj_out$",
    ),
    "digits-sd15": (),
}


def on_digits(
    method: Method, *, num_steps: int | None = None, model: str = "digits-sd3"
) -> TrainConfig:
    """A method on a shipped teacher: its scale, its shift, its layers.

    Args:
        method: What is trained.
        num_steps: Of the student; None takes the method's usual count.
        model: digits-sd3 or digits-sd15.
    """
    steps = method.facts.num_steps if num_steps is None else num_steps
    is_flow = model == "digits-sd3"
    return TrainConfig(
        model=model,
        out=Path(f"runs/{method.facts.name}"),
        method=method,  # pyright: ignore[reportArgumentType]
        max_sequence_length=1 if is_flow else 0,
        guidance_scale=1.2 if is_flow else 2.0,
        grid=method.grid(GridConfig(num_steps=steps, shift=3.0 if is_flow else 1.0)),
        lora=method.parameters(LoraConfig(targets=DIGITS_TARGETS[model])),
    )


# A short trajectory warm start, then matching whose noise levels lean to the noisy end.
DEFAULT_METHOD = WarmDmd2(
    warm_start=TrajectoryConfig(num_steps=500, learning_rate=2e-3, teacher_substeps=4),
    match=MatchConfig(
        num_steps=250,
        learning_rate=6e-4,
        critic_learning_rate=1e-3,
        critic_updates=3,
        critic_warmup=20,
        tau_shift=3.0,
    ),
    warm_share=0.2,
)
ONE_STEP_METHOD = WarmDmd2(
    warm_start=TrajectoryConfig(num_steps=150, learning_rate=2e-3, teacher_substeps=8),
    match=MatchConfig(num_steps=250, tau_shift=3.0, critic_warmup=20),
    warm_share=0.3,
)


# A warm start did not help on the epsilon teacher; less guidance than it is shown with did.
EPSILON_METHOD = Dmd2(match=MatchConfig(num_steps=400))
EPSILON_GUIDANCE = 1.5


def digits_default(model: str, num_steps: int = 4) -> TrainConfig:
    """The recommended run on a shipped teacher."""
    if model == "digits-sd15":
        config = dataclasses.replace(
            on_digits(EPSILON_METHOD, num_steps=num_steps, model=model),
            guidance_scale=EPSILON_GUIDANCE,
        )
    else:
        method = ONE_STEP_METHOD if num_steps == 1 else DEFAULT_METHOD
        config = on_digits(method, num_steps=num_steps, model=model)
    return dataclasses.replace(config, out=Path(f"runs/digits-{num_steps}step"))


def quick(config: TrainConfig) -> TrainConfig:
    """The same, shorter and rougher."""
    method = config.method
    if isinstance(method, WarmDmd2):
        match = dataclasses.replace(method.match, num_steps=60)
        warm = dataclasses.replace(method.warm_start, num_steps=60)
        method = dataclasses.replace(method, warm_start=warm, match=match)
    elif isinstance(method, Dmd2):
        method = Dmd2(match=dataclasses.replace(method.match, num_steps=100))
    return dataclasses.replace(
        config, method=method, evaluation=EvaluationConfig(every=100, num_images=500)
    )


def _digits(summary: str, config: TrainConfig) -> NamedRecipe:
    facts = config.method.facts
    return NamedRecipe(summary, facts.paper, facts.needs, MEASURED, config)


def _method(method: Method) -> NamedRecipe:
    facts = method.facts
    return NamedRecipe(facts.summary, facts.paper, facts.needs, MEASURED, on_digits(method))


RECIPES: dict[str, NamedRecipe] = {
    "digits-4step": _digits("the shipped flow teacher in 4 steps", digits_default("digits-sd3")),
    "digits-4step-quick": _digits(
        "the same, shorter and rougher", quick(digits_default("digits-sd3"))
    ),
    "digits-sd15-4step": _digits(
        "the shipped epsilon teacher (UNet) in 4 steps", digits_default("digits-sd15")
    ),
    "digits-1step": _digits("the shipped flow teacher in 1 step", digits_default("digits-sd3", 1)),
    "digits-sd15-1step": _digits(
        "the shipped epsilon teacher in 1 step", digits_default("digits-sd15", 1)
    ),
    "digits-sd15-4step-quick": _digits(
        "the same, shorter and rougher", quick(digits_default("digits-sd15"))
    ),
    **{
        preset.name: NamedRecipe(
            preset.summary, preset.source, preset.needs, preset.result, preset.config
        )
        for preset in PRESETS
    },
    **{name: _method(kind()) for name, kind in METHODS.items()},
}
