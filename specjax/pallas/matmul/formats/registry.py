"""The weight formats by the dtype of their codes and their levels."""

from importlib import import_module

from specjax import errors
from specjax.pallas.matmul.formats.base import Format
from specjax.pallas.matmul.weight import QuantizedWeight

# Files of this folder; each ends with its FORMATS.
_FILES = (
    "int4",
    "int8",
    "qqq",
    "qoq",
    "fp8",
    "fp4",
)
_REGISTERED: dict[tuple[str, str], Format] = {}


def register(format: Format) -> Format:
    """Adds a format.

    Raises:
        ConfigError: another one has its codes and levels.
    """
    key = (format.code_dtype, format.levels)
    if _REGISTERED.setdefault(key, format) != format:
        raise errors.ConfigError(
            f"a format with codes {key[0]} and levels={key[1]!r} is registered"
        )
    return format


for _file in _FILES:
    for _format in import_module(f"{__package__}.{_file}").FORMATS:
        register(_format)


def formats() -> tuple[Format, ...]:
    """All of them, in the order of their registration."""
    return tuple(_REGISTERED.values())


def find(code_dtype: str, levels: str) -> Format | None:
    """The format of these codes and levels, or None."""
    return _REGISTERED.get((code_dtype, levels))


def of(weight: QuantizedWeight) -> Format:
    """The format of a weight; where a format of two levels has one scale per channel, that of one level.

    Raises:
        ConfigError: there is none.
    """
    dtype = str(weight.codes.dtype)
    found = find(dtype, weight.levels)
    if found is not None and found.two_level and weight.channel_scales is None:
        found = find(dtype, "single")
    if found is None:
        known = ", ".join(f"{f.code_dtype} {f.levels!r}" for f in formats())
        raise errors.ConfigError(
            f"no format has codes {dtype} and levels={weight.levels!r}; known: {known}"
        )
    return found
