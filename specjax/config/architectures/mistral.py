"""Mistral: Llama with a sliding window in all layers."""

from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Settings


def _settings(config: Settings) -> Settings:
    return {
        "rope": parts.rope(config),
        "hidden_act": parts.activation(config),
        "windows": parts.same_window(config, default=4096),
    }


MISTRAL = Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    settings=_settings,
    defaults={"max_position_embeddings": 131072},
    note="sliding window",
)
