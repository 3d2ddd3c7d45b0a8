"""Names of drafters: whole for records, short for tables and figures."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.drafters import registry


def full_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """A checked spec with the defaults of every option written out, for records."""
    defaults = {
        name: value
        for name, value in registry.options(spec["kind"]).items()
        if value is not inspect.Parameter.empty
    }
    filled = {"kind": spec["kind"], **defaults, **spec}
    return {k: full_spec(v) if _is_spec(v) else v for k, v in filled.items()}


def label(spec: dict[str, Any]) -> str:
    """Short name of a spec for tables, e.g. "ngram(draft_depth=5)"; nested specs in full."""
    given = [
        f"{name}={label(value) if _is_spec(value) else value}"
        for name, value in spec.items()
        if name != "kind"
    ]
    return spec["kind"] + (f"({', '.join(given)})" if given else "")


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and "kind" in value


def short_names(specs: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each drafter: its kind, and the options in which it differs from others of its kind.

    Args:
        specs: whole specifications, options at their defaults included (`full_spec`).
    """
    kinds, options = [_kind(spec) for spec in specs], [_options(spec) for spec in specs]
    names = []
    for kind, mine in zip(kinds, options, strict=True):
        alike = [other for k, other in zip(kinds, options, strict=True) if k == kind]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in alike)]
        told = ", ".join(f"{key}={_shown(mine[key])}" for key in differing)
        names.append(f"{kind}({told})" if told else kind)
    return names


def short_label(spec: dict[str, Any]) -> str:
    """The label of one drafter, paths shortened to their last part and options that are None left out."""
    short = {
        name: _shown(value) for name, value in spec.items() if name != "inner" and value is not None
    }
    inner = "" if "inner" not in spec else f"-{short_label(spec['inner'])}"
    return label(short) + inner


def _kind(spec: dict[str, Any]) -> str:
    return spec["kind"] + (f"-{_kind(spec['inner'])}" if "inner" in spec else "")


def _options(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {f"{prefix}{key}": value for key, value in spec.items() if key not in ("kind", "inner")}
    return found | (_options(spec["inner"], f"{prefix}inner.") if "inner" in spec else {})


def _shown(value: Any) -> Any:
    """Of a path its last part."""
    return Path(value).name if isinstance(value, str) and "/" in value else value
