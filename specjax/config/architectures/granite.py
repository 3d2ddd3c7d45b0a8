"""Granite: Llama with four multipliers."""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Settings


def _settings(config: Settings) -> Settings:
    parts.no_windows(config)
    return parts.llama(config) | {
        "query_scale": read.number(config, "attention_multiplier", 1.0),
        "embedding_multiplier": read.number(config, "embedding_multiplier", 1.0),
        "residual_multiplier": read.number(config, "residual_multiplier", 1.0),
        "logits_divisor": read.number(config, "logits_scaling", 1.0),
    }


GRANITE = Architecture(
    name="GraniteForCausalLM",
    model_type="granite",
    settings=_settings,
    defaults={"max_position_embeddings": 2048},
    note="multipliers of embeddings, residuals, attention and logits",
)
