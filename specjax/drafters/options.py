"""Checks of drafters' options."""

from typing import Any

from specjax.decoding import sampling as sample
from specjax.errors import ConfigError

_LONGEST_DEFAULT = 64  # so that no default is refused on a model of few positions


def lengths(target, **values: Any) -> None:
    """Checks lengths of drafts: whole numbers from 1 to the positions of the target, a loaded model.

    Raises:
        ConfigError: another value; the option is named.
    """
    most = max(target.config.max_position_embeddings, _LONGEST_DEFAULT)
    for name, value in values.items():
        if sample.whole(name, value) < 1:
            raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1")
        if value > most:
            raise ConfigError(f"{name}={value}: the target has {most} positions; at most so many")
