"""What declarations of architectures share."""

import logging
from typing import Any

from specjax.config import fields as read
from specjax.config.rope import RopeConfig
from specjax.errors import ConfigError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}
_log = logging.getLogger(__name__)

FULL, SLIDING = "full_attention", "sliding_attention"


def activation(config: dict[str, Any], field: str = "hidden_act", default: str = "silu") -> str:
    """The nonlinearity of the feed-forward."""
    name = config.get(field)
    name = default if name is None else name
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ConfigError(
            f"{field} = {name!r} is not supported (supported: {', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[name]


def rope(config: dict[str, Any], **defaults: Any) -> RopeConfig:
    """The rotary embedding of an architecture with one."""
    return RopeConfig.from_hf(config, **defaults)


def llama(config: dict[str, Any], **rope_defaults: Any) -> dict[str, Any]:
    """The settings that Llama's configuration decides, which others share."""
    bias = read.flag(config, "attention_bias")
    return {
        "rope": rope(config, **rope_defaults),
        "hidden_act": activation(config),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": read.flag(config, "mlp_bias"),
    }


def refuse(config: dict[str, Any], *names: str, why: str) -> None:
    """Refuses flags under which the architecture computes something that is not implemented."""
    for name in names:
        if config.get(name):
            raise ConfigError(f"{name} = {config[name]!r} is not supported ({why})")


def ignored(config: dict[str, Any], name: str, *, neutral: Any = None, why: str) -> None:
    """Warns of a setting that the architecture's own implementation does not read either."""
    value = config.get(name)
    if value is not None and value is not False and value != neutral:
        _log.warning(
            "%s = %r is not computed for model type %r: %s",
            *(name, value, config.get("model_type"), why),
        )


_GRANITE, _GEMMA2, _GEMMA3 = "GraniteForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"
# Settings that only some architectures compute, with what they are where they do nothing.
_FOREIGN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "embedding_multiplier": (1, (_GRANITE,)),
    "residual_multiplier": (1, (_GRANITE,)),
    "attention_multiplier": (None, (_GRANITE,)),
    "logits_scaling": (1, (_GRANITE,)),
    "attn_logit_softcapping": (None, (_GEMMA2, _GEMMA3)),
    "final_logit_softcapping": (None, (_GEMMA2, _GEMMA3)),
    "query_pre_attn_scalar": (None, (_GEMMA2, _GEMMA3)),
    "scale_emb": (1, ()),
    "scale_depth": (None, ()),
    "logit_scale": (1, ()),
    "clip_qkv": (None, ()),
    "use_qk_norm": (False, ()),
    "qk_layernorm": (False, ()),
    "alibi": (False, ()),
}


def foreign(config: dict[str, Any], architecture: str) -> None:
    """Warns of settings that other architectures compute and this one does not, as in transformers."""
    for name, (neutral, owners) in _FOREIGN.items():
        if architecture not in owners:
            ignored(config, name, neutral=neutral, why=f"{architecture} has no such setting")


def no_windows(config: dict[str, Any]) -> None:
    """Refuses layer types that the architecture does not have."""
    stated = read.listed(config, "layer_types", read.size(config, "num_hidden_layers"))
    other = {str(kind) for kind in stated or ()} - {FULL}
    if other:
        raise ConfigError(
            f"layer_types has {sorted(other)}: only {FULL} is supported for "
            f"model type {config.get('model_type')!r}"
        )


def same_window(config: dict[str, Any], default: int | None) -> tuple[int | None, ...]:
    """Windows of an architecture whose layers all have that of `sliding_window`; null is none."""
    count = read.size(config, "num_hidden_layers")
    window = config.get("sliding_window", default)
    window = None if window is None else read.size(config, "sliding_window", default)
    stated = {str(kind) for kind in read.listed(config, "layer_types", count) or ()}
    if stated - {FULL if window is None else SLIDING}:
        raise ConfigError(
            f"layer_types has {sorted(stated)} beside sliding_window = {window!r}, which holds for "
            "all layers of this architecture"
        )
    return (window,) * count


def typed_windows(
    config: dict[str, Any], types: list[str], window: int | None
) -> tuple[int | None, ...]:
    """Windows by `layer_types`; `types` is the default."""
    stated = read.listed(config, "layer_types", len(types))
    types = types if stated is None else stated
    unknown = sorted({str(kind) for kind in types} - {FULL, SLIDING})
    if unknown:
        raise ConfigError(f"layer_types has {unknown}: supported are {FULL} and {SLIDING}")
    if window is None and SLIDING in types:
        raise ConfigError(f"layer_types has {SLIDING}, but there is no sliding_window")
    return tuple(window if kind == SLIDING else None for kind in types)


def qwen_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Windows of the layers from `max_window_layers` on, where `use_sliding_window` is true."""
    count, window = read.size(config, "num_hidden_layers"), None
    if read.flag(config, "use_sliding_window") and config.get("sliding_window", 4096) is not None:
        window = read.size(config, "sliding_window", 4096)
    first = config.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise ConfigError(f"max_window_layers = {first!r}: expected a number of layers")
    types = [SLIDING if window is not None and i >= first else FULL for i in range(count)]
    return typed_windows(config, types, window)
