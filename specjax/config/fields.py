"""Checked reading of the fields of a config.json; an error names the field, what it holds and what is expected."""

import logging
import math
import operator
from typing import Any

from specjax.errors import ConfigError

_log = logging.getLogger(__name__)
_TOO_MANY = 2**31  # positions and indices are int32


def size(config: dict[str, Any], field: str, default: int | None = None) -> int:
    """A positive integer; null and a missing field are the default."""
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{field} is missing from the configuration")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _TOO_MANY:
        raise ConfigError(f"{field} = {value!r}: expected a positive integer below 2^31")
    return value


def positive(field: str, value: Any) -> float:
    """A finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{field} = {value!r}: expected a positive number")
    return float(value)


def number(config: dict[str, Any], field: str, default: float | None = None) -> float | None:
    """A positive number; null and a missing field are the default, which may be None."""
    value = config.get(field)
    return default if value is None else positive(field, value)


def flag(config: dict[str, Any], field: str, default: bool = False) -> bool:
    """True or false; null and a missing field are the default."""
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{field} = {value!r}: expected true or false")
    return value


def whole(name: str, value: Any) -> int:
    """A whole number of any size.

    Raises:
        ConfigError: it is something else; the option is named.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ConfigError(f"{name}={value!r}: must be a whole number")


def token_ids(config: dict[str, Any], field: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing, which -1 says too."""
    value = config.get(field)
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for item in values:
        if not isinstance(item, int) or isinstance(item, bool) or item < -1:
            raise ConfigError(f"{field} = {value!r}: expected a token id or a list of them")
    return tuple(item for item in values if item >= 0)


def mapping(field: str, value: Any) -> dict[str, Any]:
    """An object; null is an empty one."""
    if not isinstance(value, dict | None):
        raise ConfigError(f"{field} = {value!r}: expected an object")
    return dict(value or {})


def homes(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a config.json that may hold settings of the language model: itself, and `text_config`."""
    nested = config.get("text_config")
    return [config, nested] if isinstance(nested, dict) else [config]


def listed(config: dict[str, Any], field: str, count: int) -> list | None:
    """A list of one entry per layer at least, cut to the layers; None where there is none."""
    value = config.get(field)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) < count:
        raise ConfigError(f"{field} = {value!r}: expected a list of {count} entries, one per layer")
    return list(value[:count])


def settle(found: dict[str, Any]) -> Any:
    """The value of a setting that has more than one home.

    transformers' precedence is the order of `found`; null means that the home says nothing. Where homes disagree, the
    first is followed and a warning says so: whoever wrote the others expected them to count.

    Args:
        found: value by home, e.g. {"dtype": "float16", "torch_dtype": None}.
    """
    said = {home: value for home, value in found.items() if value is not None}
    if not said:
        return None
    first, chosen = next(iter(said.items()))
    for home, value in said.items():
        if value != chosen:
            _log.warning("%s = %r is followed, not %s = %r", first, chosen, home, value)
    return chosen
