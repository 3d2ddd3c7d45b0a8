"""Qwen2 and Qwen2.5: biases of q, k and v; windows in the upper layers if asked for."""

from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Settings


def _settings(config: Settings) -> Settings:
    return {
        "rope": parts.rope(config),
        "hidden_act": parts.activation(config),
        "windows": parts.qwen_windows(config),
        "qkv_bias": True,
    }


QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    settings=_settings,
    defaults={"max_position_embeddings": 32768},
    note="biases of q, k, v; sliding window",
)
