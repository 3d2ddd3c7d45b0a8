"""OLMo 2: norms behind attention and feed-forward, none in front; norms over all queries and all keys."""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Layout, Settings


def _settings(config: Settings) -> Settings:
    parts.no_windows(config)
    bias = read.flag(config, "attention_bias")
    return {
        "rope": parts.rope(config),
        "hidden_act": parts.activation(config),
        "norm_placement": "after",
        "qk_norm": "projection",
        "qkv_bias": bias,
        "o_bias": bias,
    }


OLMO2 = Architecture(
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    settings=_settings,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    layout=Layout(
        leaves={
            "attention_output_norm": "post_attention_layernorm",
            "mlp_output_norm": "post_feedforward_layernorm",
        }
    ),
    note="norms behind the blocks; q/k norms over the projection",
)
