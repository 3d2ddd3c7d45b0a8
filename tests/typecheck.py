"""The checker that tests put on every function of specjax: shapes and dtypes of annotated arrays."""

import typing
from collections.abc import Callable

import jaxtyping

try:
    from beartype import beartype
except ModuleNotFoundError:  # as on a machine that was given a copy of this repository only
    beartype = None


def check(function: Callable) -> Callable:
    """Checks those arguments and results whose annotation names an array shape; not in constructors.

    JAX rebuilds state classes (registered dataclasses) through their constructor with whatever a
    transformation keeps in the place of arrays: batch axes, shapes, `None`, donation marks.
    """
    if function.__name__ == "__init__" or beartype is None:
        return function
    hints = function.__annotations__
    function.__annotations__ = {
        name: hint if _is_checkable(hint) else typing.Any for name, hint in hints.items()
    }
    return beartype(function)


def _is_checkable(hint: object) -> bool:
    parts = list(_parts(hint))
    return any(map(_is_array, parts)) and not any(
        part is typing.Self or getattr(part, "_is_protocol", False) for part in parts
    )


def _is_array(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def _parts(hint: object) -> typing.Iterator[object]:
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)
