"""The architectures that can be loaded: one small declaration each. To add one, write its file and list it here."""

from typing import Any

from specjax.config.architectures.base import FUSED, Architecture, Layout
from specjax.config.architectures.gemma2 import GEMMA2
from specjax.config.architectures.gemma3 import GEMMA3
from specjax.config.architectures.glm import GLM, GLM4
from specjax.config.architectures.gpt2 import GPT2
from specjax.config.architectures.granite import GRANITE
from specjax.config.architectures.llama import LLAMA
from specjax.config.architectures.mistral import MISTRAL
from specjax.config.architectures.olmo2 import OLMO2
from specjax.config.architectures.phi3 import PHI3
from specjax.config.architectures.qwen2 import QWEN2
from specjax.config.architectures.qwen3 import QWEN3
from specjax.config.architectures.smollm3 import SMOLLM3
from specjax.errors import ConfigError

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GRANITE, OLMO2, SMOLLM3),
        *(GEMMA2, GEMMA3, GPT2, GLM, GLM4),
    )
}
_BY_NAME = {name: found for found in ARCHITECTURES.values() for name in (found.name, *found.also)}
_BY_TYPE = {
    name: found for found in ARCHITECTURES.values() for name in (found.model_type, *found.also)
}


def lookup(config: dict[str, Any]) -> Architecture:
    """The architecture that a config.json names, by its class, else by its model type.

    Raises:
        ConfigError: it names none of them; the message lists them.
    """
    names = config.get("architectures")
    if names:
        name = names[0] if isinstance(names, list) else names
        if not isinstance(name, str) or name not in _BY_NAME:
            raise ConfigError(
                f"architectures = {names!r} is not supported (supported: {', '.join(ARCHITECTURES)})"
            )
        return _BY_NAME[name]
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _BY_TYPE:
        types = ", ".join(found.model_type for found in ARCHITECTURES.values())
        raise ConfigError(f"model_type = {model_type!r} is not supported (supported: {types})")
    return _BY_TYPE[model_type]


def by_model_type(config: dict[str, Any]) -> Architecture | None:
    """The architecture of the field `model_type`, None where it names none of them."""
    model_type = config.get("model_type")
    return _BY_TYPE.get(model_type) if isinstance(model_type, str) else None


__all__ = ["ARCHITECTURES", "FUSED", "Architecture", "Layout", "by_model_type", "lookup"]
