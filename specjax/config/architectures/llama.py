"""Llama; the settings that everything else differs from."""

from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Settings


def _settings(config: Settings) -> Settings:
    parts.no_windows(config)
    return parts.llama(config)


LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    settings=_settings,
    defaults={"max_position_embeddings": 2048},
)
