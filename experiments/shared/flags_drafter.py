"""--drafter and the flags of its options, and the spec that they describe."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments.shared import flag_groups
from specjax.drafters import registry, tuning
from specjax.errors import ConfigError

_log = logging.getLogger(__name__)

# Flag -> option of the drafter's spec.
OPTION_FLAGS = {
    "draft_checkpoint": "model",
    "draft_tree": "tree",
    "draft_depth": "draft_depth",
    "draft_topk": "topk",
    "num_nodes": "num_nodes",
    "draft_vocabulary_size": "vocabulary_size",
    "draft_window": "window",
    "ngram_max": "ngram_max",
    "ngram_min": "ngram_min",
    "draft_scheme": "scheme",
    "min_draft_depth": "min_draft_depth",
}
_INTEGERS = {
    "draft_depth": "Levels of the draft tree (upstream EAGLE's depth + 1), or length of the chain.",
    "num_nodes": "Nodes of the draft tree, the root included.",
    "draft_topk": "Children per node of the draft tree (option 'topk').",
    "draft_vocabulary_size": "An EAGLE-1/2 head scores only so many frequent tokens (option 'vocabulary_size').",
    "draft_window": "Tokens of the text that a draft head's attention sees at most (option 'window').",
    "ngram_max": "Longest n-gram that is looked up.",
    "ngram_min": "Shortest n-gram that is looked up.",
    "min_draft_depth": "Shortest chain that 'hierarchical' hands to the target.",
}
# Flags that describe --drafter; a preset's are dropped where another drafter is given.
DRAFTER_FLAGS = (*OPTION_FLAGS, "inner_drafter", "inner_checkpoint")


def define(values: flags.FlagValues, default: str = "none") -> None:
    """--drafter and the flags that set single options of it; --tuned takes a drafter from a file instead."""
    with flag_groups.heading(values, "Drafter"):
        flags.DEFINE_string(
            "drafter",
            default,
            f"One of {', '.join(registry.kinds())}, or a JSON object with 'kind' and options.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "draft_checkpoint",
            None,
            "Draft head or draft model (option 'model').",
            flag_values=values,
        )
        flags.DEFINE_string(
            "draft_tree",
            None,
            "Shape of the drafts of 'head': chain, best-first or topk; of 'medusa' the name of a tree (option 'tree').",
            flag_values=values,
        )
        for name, text in _INTEGERS.items():
            flags.DEFINE_integer(name, None, text, lower_bound=1, flag_values=values)
        flags.DEFINE_string(
            "draft_scheme", None, "Scheme of the draft (option 'scheme').", flag_values=values
        )
        flags.DEFINE_string(
            "inner_drafter",
            None,
            "Drafter of the draft model: a name or JSON (option 'inner' of 'hierarchical').",
            flag_values=values,
        )
        flags.DEFINE_string(
            "inner_checkpoint", None, "Option 'model' of the inner drafter.", flag_values=values
        )
        flags.DEFINE_string(
            "tuned", None, "Drafter that experiments.tune chose (its --output).", flag_values=values
        )


def spec(values: flags.FlagValues) -> dict[str, Any]:
    """The drafter's spec from --drafter and its option flags, checked; nothing is loaded.

    Raises:
        ConfigError: malformed JSON, unknown kind or option, a flag that the kind has no option for or that
            repeats an option of the JSON.
    """
    if values.tuned is not None:
        return _tuned_spec(values)
    spec = _unchecked_spec("drafter", values.drafter)
    for flag, option in OPTION_FLAGS.items():
        if values[flag].value is not None:
            _set_option(spec, option, values[flag].value, flag, "drafter")
    if values.inner_drafter is not None:
        inner = _unchecked_spec("inner_drafter", values.inner_drafter)
        if values.inner_checkpoint is not None:
            _set_option(
                inner, "model", values.inner_checkpoint, "inner_checkpoint", "inner_drafter"
            )
        _set_option(spec, "inner", inner, "inner_drafter", "drafter")
    elif values.inner_checkpoint is not None:
        raise ConfigError("--inner_checkpoint needs --inner_drafter")
    registry.check(spec)
    return spec


def _tuned_spec(values: flags.FlagValues) -> dict[str, Any]:
    """The drafter of --tuned; a warning says where it was tuned for something else."""
    others = [name for name in ("drafter", *OPTION_FLAGS) if values[name].present]
    if others:
        raise ConfigError(f"--tuned says which drafter runs; drop --{', --'.join(others)}")
    content = tuning.read(Path(values.tuned))
    here = {"model": values.model, "scheme": values.scheme, "device_kind": _device_kind()}
    there = content | {"device_kind": content["environment"]["device_kind"]}
    for name, value in here.items():
        if there.get(name) != value:
            _log.warning(
                "--tuned=%s was made with %s=%r, not %r: another tree may be faster here",
                *(values.tuned, name, there.get(name), value),
            )
    registry.check(content["drafter"])
    return content["drafter"]


def _device_kind() -> str:
    return jax.devices()[0].device_kind


def _unchecked_spec(flag: str, text: str) -> dict[str, Any]:
    """A spec of a known kind; options may be missing that other flags still set."""
    try:
        spec = json.loads(text) if text.lstrip().startswith("{") else {"kind": text.strip()}
    except json.JSONDecodeError as error:
        raise ConfigError(f"--{flag}={text!r} is not valid JSON: {error}") from None
    if not isinstance(spec.get("kind"), str):
        registry.check(spec)
    registry.options(spec["kind"])
    return spec


def _set_option(spec: dict[str, Any], option: str, value: Any, flag: str, source: str) -> None:
    """Puts a flag's value into a spec."""
    known = registry.options(spec["kind"])
    if option not in known:
        raise ConfigError(
            f"--{flag}: drafter {spec['kind']!r} has no option {option!r}; "
            f"it has: {', '.join(known) or 'none'}"
        )
    if option in spec:
        raise ConfigError(f"--{flag}: the JSON of --{source} sets {option!r} too; drop one of them")
    spec[option] = value
