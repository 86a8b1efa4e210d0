"""Range checks of settings, one sentence each."""

from fewstep.errors import ConfigError


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
