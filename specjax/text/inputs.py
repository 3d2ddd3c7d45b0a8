"""Forms in which prompts and token ids are given, brought to lists of Python's numbers."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from specjax.config.fields import whole
from specjax.errors import ConfigError

# A user turn as text, token ids, or a row with one of the fields; the first that it has counts.
Prompt = str | Sequence[int] | Mapping[str, Any]
FIELDS = ("input_ids", "messages", "text", "prompt")  # text is raw, prompt a user turn


def as_list(prompts: Any) -> list:
    """A list of prompts; whole numbers, in a list or an array, are one prompt.

    Raises:
        ConfigError: it is nothing that could be a prompt or several.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    given = _items("prompts", "text, token ids, a row or a list of these", prompts)
    # Elements of JAX's arrays are arrays without axes, not numbers.
    one = given and (isinstance(given[0], Integral) or getattr(given[0], "ndim", None) == 0)
    return [given] if one else given


def token_ids(name: str, value: Any) -> list[int]:
    """Token ids of any integer type; `name` is what errors call them.

    Raises:
        ConfigError: something else; what was found is named.
    """
    given = _items(name, "a list of token ids", value)
    return [whole(f"{name}[{i}]", token) for i, token in enumerate(given)]


def numbers(request_ids: Any, count: int) -> list[int]:
    """Numbers of `count` requests' random streams; None: from 0.

    Raises:
        ConfigError: they are not `count` different ones of 32 bits.
    """
    if request_ids is None:
        return list(range(count))
    found = token_ids("request_ids", request_ids)
    if not len(set(found)) == len(found) == count or not all(0 <= n < 2**32 for n in found):
        raise ConfigError(f"{request_ids=}: {count} different numbers below 2**32 are needed")
    return found


def _items(name: str, expected: str, value: Any) -> list:
    if not isinstance(value, str | bytes | Mapping):
        try:
            return list(value)
        except TypeError:
            pass
    raise ConfigError(f"{name}: expected {expected}, found {type(value).__name__}")
