"""Checks of drafters' options."""

from specjax.errors import ConfigError


def positive(**values: int) -> None:
    """Raises ConfigError, naming the option, unless each is a whole number of at least 1."""
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")
