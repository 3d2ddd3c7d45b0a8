"""What a model with routed layers states about itself, in the keys of D-LLM's Hugging Face configuration."""

from dataclasses import dataclass
from typing import Any

from specjax.errors import ConfigError

CODE_BITS = (4, 8)
_KEYS = {
    "start_layer": "dynamic_start_layer",
    "reserved_tokens": "dynamic_reserve_initials",
    "router_width": "dynamic_router_hdim",
    "target_rate": "dynamic_active_target",
    "code_bits": "dynamic_router_bits",
}


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Settings of D-LLM's routed layers (NeurIPS 2024, section 3) and of SpaDec's robust router.

    Attributes:
        start_layer: first layer that has a router; those before it always run.
        reserved_tokens: tokens at the start of every sequence that run through all layers.
        router_width: hidden units of a router.
        target_rate: fraction of layers that training aims at.
        code_bits: bits of the codes that routers see instead of the hidden state itself; None: they see the state.
    """

    start_layer: int = 2
    reserved_tokens: int = 2
    router_width: int = 512
    target_rate: float = 0.5
    code_bits: int | None = None

    def __post_init__(self):
        for field in ("start_layer", "reserved_tokens", "router_width"):
            value, least = getattr(self, field), int(field == "router_width")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{_KEYS[field]}={value!r}: an integer >= {least} is needed")
        if not 0 < self.target_rate <= 1:
            raise ConfigError(f"{_KEYS['target_rate']}={self.target_rate!r}: must be in (0, 1]")
        if self.code_bits is not None and self.code_bits not in CODE_BITS:
            raise ConfigError(
                f"{_KEYS['code_bits']}={self.code_bits!r}: supported are 4, 8 and null"
            )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "DepthConfig | None":
        """The settings in a `config.json`, or None if the model has none (its depth is full).

        Raises:
            ConfigError: a value is out of range.
        """
        if not any(key.startswith("dynamic_") for key in config):
            return None
        return cls(**{field: config[key] for field, key in _KEYS.items() if key in config})

    def to_hf(self) -> dict[str, Any]:
        """The keys of `config.json`."""
        return {key: getattr(self, field) for field, key in _KEYS.items()}
