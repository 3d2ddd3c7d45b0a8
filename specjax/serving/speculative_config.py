"""vLLM's `--speculative-config`: its JSON, as the spec of a drafter here."""

import json
from typing import Any

from specjax.errors import ConfigError

# vLLM's methods whose folder tells the kind.
_HEADS = ("eagle", "eagle3", "medusa", "mtp", "dflash", "dspark", "pard", "p_eagle", "speculators")
_COMMON = ("method", "model", "num_speculative_tokens")
_MORE = {
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
    "suffix": ("suffix_decoding_max_tree_depth",),
}


def spec(text: str) -> dict[str, Any]:
    """The spec.

    Raises:
        ConfigError: no JSON object, or a method or key that is not supported.
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"speculative_config is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"speculative_config={text!r}: expected a JSON object")
    method = config.get("method") or ("speculators" if config.get("model") else None)
    supported = ("ngram", "suffix", "draft_model", *_HEADS)
    if method not in supported:
        raise ConfigError(
            f"speculative_config: method={method!r} is not supported; supported: {', '.join(supported)}"
        )
    known = (*_COMMON, *_MORE.get(method, ()))
    if unknown := sorted(set(config) - set(known)):
        raise ConfigError(
            f"speculative_config: {unknown[0]} is not supported for method={method!r}; supported: {', '.join(known)}"
        )
    return _spec(method, config)


def _spec(method: str, config: dict[str, Any]) -> dict[str, Any]:
    depth, model = config.get("num_speculative_tokens"), config.get("model")
    found: dict[str, Any]
    if method == "ngram":
        found = {"kind": "ngram", "ngram_max": config.get("prompt_lookup_max")}
        found["ngram_min"] = config.get("prompt_lookup_min")
    elif method == "suffix":
        found = {"kind": "suffix"}
        depth = config.get("suffix_decoding_max_tree_depth", depth)
    else:
        if model is None:
            raise ConfigError(f"speculative_config: method={method!r} needs model")
        found = {"kind": "lm" if method == "draft_model" else "head", "model": model}
        if found["kind"] == "head" and depth is not None:
            # vLLM drafts chains of that length.
            found["tree"] = "chain"
    found["draft_depth"] = depth
    return {name: value for name, value in found.items() if value is not None}
