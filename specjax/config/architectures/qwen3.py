"""Qwen3: norms of each query and key head."""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Settings


def _settings(config: Settings) -> Settings:
    bias = read.flag(config, "attention_bias")
    return {
        "rope": parts.rope(config),
        "hidden_act": parts.activation(config),
        "windows": parts.qwen_windows(config),
        "qk_norm": "head",
        "qkv_bias": bias,
        "o_bias": bias,
    }


QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    settings=_settings,
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
    note="q/k norms; sliding window",
)
