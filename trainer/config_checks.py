"""Range checks of settings, and rules that tie two of them, one sentence each."""

from typing import TYPE_CHECKING

from fewstep.errors import ConfigError

if TYPE_CHECKING:
    from fewstep.trainer.config import TrainConfig


def at_least(name: str, value: float, least: float) -> None:
    """Raise ConfigError where value < least."""
    if value < least:
        raise ConfigError(f"{name} must be >= {least:g}, got {value:g}")


def above(name: str, value: float, bound: float) -> None:
    """Raise ConfigError where value <= bound."""
    if value <= bound:
        raise ConfigError(f"{name} must be above {bound:g}, got {value:g}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError where value is outside [low, high]."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must be {low:g} to {high:g}, got {value:g}")


def check_base(config: "TrainConfig") -> None:
    """Raise ConfigError where a base that is packed or cut meets roles that need it plain.

    A network of a role's own begins as a copy of the base. FSDP2 would also reduce its gradients in
    every backward pass that meets it, while here only a learner's own parameters get gradients.
    """
    lora = config.lora
    if config.shard and config.quantise != "none":
        raise ConfigError(
            f"quantise {config.quantise} packs the weights that shard would cut; choose one of them"
        )
    for who, kind in (("student", lora.student), ("critic", lora.critic)):
        if kind in ("full", "smaller") and config.shard:
            raise ConfigError(
                f"lora.{who} {kind} is a copy of the base, and with shard no process has the base "
                "whole; train an adapter, or leave shard out"
            )
        if kind in ("full", "smaller", "lorad") and config.quantise != "none":
            raise ConfigError(
                f"lora.{who} {kind} changes the base's own weights, and quantise "
                f"{config.quantise} packs them; set lora.{who} to lora, or quantise to none"
            )
