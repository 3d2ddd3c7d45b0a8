"""How tokens are chosen and when a generation ends: flags for the fields of `specjax.Options`."""

import functools
from typing import Any

from absl import flags

from experiments.shared import flag_groups
from specjax import verify

_OPTIONS = (
    *("max_new_tokens", "max_length", "temperature", "top_k", "top_p", "stop", "seed"),
    *("batch_size", "acceptance", "ignore_eos", "stop_token_ids"),
)


def define(values: flags.FlagValues, max_new_tokens: int | None = 128) -> None:
    """The flags of `specjax.Options`."""
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    with flag_groups.heading(values, "Sampling"):
        integer("max_new_tokens", max_new_tokens, "Most new tokens per request.", lower_bound=1)
        number("temperature", 0.0, "0 is greedy decoding.", lower_bound=0.0)
        number("top_p", 1.0, "Sample from this probability mass; 1 is off.", upper_bound=1.0)
        integer("top_k", 0, "Sample from the k most likely tokens; 0 is off.", lower_bound=0)
        integer("seed", 0, "Seed of all random choices.")
        flags.DEFINE_multi_string(
            "stop",
            [],
            "String that ends a text and is cut off, special tokens too; may be repeated.",
            flag_values=values,
        )
        flags.DEFINE_multi_integer(
            "stop_token_ids",
            None,
            "Token id that ends a generation besides the model's own; may be repeated.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "ignore_eos", False, "Go on after the model's stop tokens.", flag_values=values
        )
        integer("max_length", None, "Most tokens, prompt included.", lower_bound=1)
        flags.DEFINE_enum(
            "acceptance",
            "lossless",
            verify.ACCEPTANCES,
            "Acceptance rule; typical and relaxed do not keep the target's output.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Execution"):
        integer("batch_size", 1, "Requests that run together.", lower_bound=1)


def options(values: flags.FlagValues) -> dict[str, Any]:
    """Keyword arguments of `LanguageModel.generate` from the sampling flags."""
    return {name: values[name].value for name in _OPTIONS} | {"stop": tuple(values.stop)}
