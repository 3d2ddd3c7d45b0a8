"""Gemma 2: norms on both sides with gains 1 + w, scaled embeddings, softcaps, a window in every other layer."""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Layout, Settings

SANDWICH = Layout(
    leaves={
        "attention_output_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    }
)


def shared(config: Settings) -> Settings:
    """What Gemma 2 and 3 have in common."""
    parts.refuse(config, "use_bidirectional_attention", why="only causal attention")
    bias = read.flag(config, "attention_bias")
    return {
        "hidden_act": parts.activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "norm_placement": "both",
        "norm_offset": 1.0,
        "qkv_bias": bias,
        "o_bias": bias,
        "query_scale": read.number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        "embedding_multiplier": read.size(config, "hidden_size") ** 0.5,
    }


def softcap(config: Settings, name: str, default: float | None) -> float | None:
    """A softcap; null is none, and only where the field is missing the default counts."""
    return read.number(config, name) if name in config else default


def _settings(config: Settings) -> Settings:
    count = read.size(config, "num_hidden_layers")
    window = config.get("sliding_window", 4096)
    window = None if window is None else read.size(config, "sliding_window", 4096)
    types = [parts.FULL if index % 2 else parts.SLIDING for index in range(count)]
    return shared(config) | {
        "rope": parts.rope(config),
        "windows": parts.typed_windows(config, types, window),
        "score_softcap": softcap(config, "attn_logit_softcapping", 50.0),
        "logit_softcap": softcap(config, "final_logit_softcapping", 30.0),
    }


GEMMA2 = Architecture(
    name="Gemma2ForCausalLM",
    model_type="gemma2",
    settings=_settings,
    defaults={"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True},
    layout=SANDWICH,
    note="norms on both sides; softcaps; alternating windows",
)
