"""Short names of drafters, for tables and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def short_names(specs: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each drafter: its kind, and the options in which it differs from others of its kind.

    Args:
        specs: whole specifications, options at their defaults included (`common.full_spec`).
    """
    kinds, options = [_kind(spec) for spec in specs], [_options(spec) for spec in specs]
    names = []
    for kind, mine in zip(kinds, options, strict=True):
        alike = [other for k, other in zip(kinds, options, strict=True) if k == kind]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in alike)]
        told = ", ".join(f"{key}={_shown(mine[key])}" for key in differing)
        names.append(f"{kind}({told})" if told else kind)
    return names


def _kind(spec: dict[str, Any]) -> str:
    return spec["kind"] + (f"-{_kind(spec['inner'])}" if "inner" in spec else "")


def _options(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {f"{prefix}{key}": value for key, value in spec.items() if key not in ("kind", "inner")}
    return found | (_options(spec["inner"], f"{prefix}inner.") if "inner" in spec else {})


def _shown(value: Any) -> Any:
    """Of a path its last part."""
    return Path(value).name if isinstance(value, str) and "/" in value else value
