"""Gemma 3, the language model: two rotary embeddings by layer kind, norms of each query and key head."""

from typing import Any

from specjax.config import fields as read
from specjax.config import rope as ropes
from specjax.config.architectures import gemma2, parts
from specjax.config.architectures.base import Architecture, Settings
from specjax.errors import ConfigError


def _ropes(config: Settings) -> Settings:
    """transformers 5 nests one object per layer kind; transformers 4 scaled the full layers by `rope_scaling`."""
    scaling = read.mapping("rope_scaling", config.get("rope_scaling"))
    nested = read.mapping("rope_parameters", config.get("rope_parameters"))
    if nested and parts.FULL not in nested and parts.SLIDING not in nested:
        raise ConfigError(
            f"rope_parameters = {nested!r}: expected an object for each of {parts.FULL} and {parts.SLIDING}"
        )
    found: dict[str, Any] = {}
    for kind, field, theta in (
        (parts.FULL, "rope_theta", 1e6),
        (parts.SLIDING, "rope_local_base_freq", 1e4),
    ):
        name = f"rope_parameters.{kind}"
        stated = read.mapping(name, nested.get(kind))
        if kind == parts.FULL and scaling:
            for key in sorted(stated.keys() & scaling.keys()):
                read.settle({f"rope_scaling.{key}": scaling[key], f"{name}.{key}": stated[key]})
            stated, name = {**stated, **scaling}, "rope_scaling"
        found[kind] = ropes.read_rope(name, stated, config, theta=theta, theta_field=field)
    return {"rope": found[parts.FULL], "local_rope": found[parts.SLIDING]}


def _settings(config: Settings) -> Settings:
    parts.ignored(config, "attn_logit_softcapping", why="transformers and llama.cpp cap no scores")
    count, window = (
        read.size(config, "num_hidden_layers"),
        read.size(config, "sliding_window", 4096),
    )
    pattern = read.size(config, "sliding_window_pattern", 6)
    types = [parts.SLIDING if (i + 1) % pattern else parts.FULL for i in range(count)]
    windows = parts.typed_windows(config, types, window)
    return (
        gemma2.shared(config)
        | _ropes(config)
        | {
            "windows": windows,
            "rotary": tuple(0 if window is None else 1 for window in windows),
            "qk_norm": "head",
            "logit_softcap": gemma2.softcap(config, "final_logit_softcapping", None),
        }
    )


GEMMA3 = Architecture(
    name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    settings=_settings,
    defaults={
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    layout=gemma2.SANDWICH,
    also=("Gemma3ForConditionalGeneration", "gemma3"),
    note="norms on both sides; two rotary embeddings; q/k norms; windows (text only)",
)
