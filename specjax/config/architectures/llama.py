"""Llama; the settings that everything else differs from."""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Settings


def _settings(config: Settings) -> Settings:
    parts.no_windows(config)
    bias = read.flag(config, "attention_bias")
    return {
        "rope": parts.rope(config),
        "hidden_act": parts.activation(config),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": read.flag(config, "mlp_bias"),
    }


LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    settings=_settings,
    defaults={"max_position_embeddings": 2048},
)
