"""Drafters by name: a spec is a name or a nestable dict (JSON on command lines), the same for Python and binaries.

To add a drafter: write its file in this folder, with a `build`, and name it in `_MODULES`. Nothing else changes.

A `build` takes the target (`specjax.loading.LoadedModel`) and the drafter's options, with their defaults; where it has
a parameter `registry`, this module is passed, to build drafters of its own. A module whose drafter reads the target's
codes has `reads_codes(spec)`.
"""

import importlib
import inspect
import json
import sys
from types import ModuleType
from typing import Any

from specjax.drafters.base import Drafter
from specjax.errors import ConfigError
from specjax.models import prepare

Spec = str | dict[str, Any] | Drafter

# Kind of drafter -> its file in this folder; imported when it is asked for.
_MODULES = {
    "none": "none",
    "ngram": "ngram",
    "lm": "lm",
    "self": "self_draft",
    "eagle": "eagle",
    "medusa": "medusa",
    "head": "head",
    "hierarchical": "hierarchical",
    "suffix": "suffix",
    "merge": "merge",
}
_GIVEN = ("target", "registry")


def kinds() -> tuple[str, ...]:
    """Names of all drafters."""
    return tuple(_MODULES)


def _module(kind: str) -> ModuleType:
    if kind not in _MODULES:
        raise ConfigError(f"drafter={kind!r}: supported are {', '.join(_MODULES)}")
    return importlib.import_module(f"specjax.drafters.{_MODULES[kind]}")


def options(kind: str) -> dict[str, Any]:
    """Options of a kind with their defaults; required ones have `inspect.Parameter.empty`.

    Raises:
        ConfigError: there is no such kind.
    """
    parameters = inspect.signature(_module(kind).build).parameters
    return {name: p.default for name, p in parameters.items() if name not in _GIVEN}


def parse(text: str) -> dict[str, Any]:
    """A spec from a command line: a name, or a JSON object with `kind` and options.

    Raises:
        ConfigError: malformed JSON, unknown kind or option.
    """
    if not text.lstrip().startswith("{"):
        spec = {"kind": text.strip()}
    else:
        try:
            spec = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"drafter={text!r} is not valid JSON: {error}") from None
    check(spec)
    return spec


def check(spec: dict[str, Any]) -> None:
    """Checks a dict spec, nested ones included, without loading anything.

    Raises:
        ConfigError: no or unknown kind, unknown or missing option.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("kind"), str):
        raise ConfigError(f"drafter={spec!r}: expected an object with a 'kind'")
    known = options(spec["kind"])
    for name, value in spec.items():
        if name == "kind":
            continue
        if name not in known:
            raise ConfigError(
                f"drafter {spec['kind']!r} has no option {name!r}; it has: {', '.join(known) or 'none'}"
            )
        for inner in _inner(name, value):
            check(inner)
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in spec:
            raise ConfigError(f"drafter {spec['kind']!r} needs the option {name!r}")


def _inner(name: str, value: Any) -> list:
    """Specs of other drafters in an option."""
    if name == "of" and not isinstance(value, list | tuple):
        raise ConfigError(f"drafter option of={value!r}: expected a list of drafters")
    return {"inner": [value], "of": value}.get(name, [])


def build(spec: Spec, target) -> Drafter:
    """The drafter that a spec describes, for a loaded target (`specjax.loading.LoadedModel`), on the target's backend.

    Raises:
        ConfigError: the spec is malformed or does not fit the target.
        CheckpointError: a draft checkpoint cannot be read or does not fit.
    """
    if not isinstance(spec, str | dict):
        return spec
    spec = parse(spec) if isinstance(spec, str) else dict(spec)
    check(spec)
    arguments = {name: value for name, value in spec.items() if name != "kind"}
    builder = _module(spec["kind"]).build
    if "registry" in inspect.signature(builder).parameters:
        arguments["registry"] = sys.modules[__name__]
    return prepare.with_backend(builder(target, **arguments), target.module.backend)


def needs_codes(spec: Spec) -> bool:
    """Whether a drafter reads its target's codes, which must then be loaded with dequantize="never"."""
    if isinstance(spec, str):
        spec = parse(spec)
    if not isinstance(spec, dict):
        return False
    # The target of a hierarchical drafter's inner one is the model in the middle.
    if any(needs_codes(other) for other in spec.get("of", ())):
        return True
    reads_codes = getattr(_module(spec["kind"]), "reads_codes", None)
    return reads_codes is not None and reads_codes(spec)
