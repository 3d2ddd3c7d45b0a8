"""SmolLM3: every fourth layer has no rotary embedding."""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import Architecture, Settings
from specjax.errors import ConfigError


def _settings(config: Settings) -> Settings:
    count = read.size(config, "num_hidden_layers")
    turns = read.listed(config, "no_rope_layers", count)
    if turns is None:
        interval = read.size(config, "no_rope_layer_interval", 4)
        turns = [(index + 1) % interval != 0 for index in range(count)]
    if any(turn not in (0, 1) for turn in turns):
        raise ConfigError(f"no_rope_layers = {turns!r}: expected 0 (no rotary embedding) and 1")
    window = None
    if read.flag(config, "use_sliding_window") and config.get("sliding_window") is not None:
        window = read.size(config, "sliding_window")
    types = [parts.FULL if turn or window is None else parts.SLIDING for turn in turns]
    return parts.llama(config, theta=2e6) | {
        "windows": parts.typed_windows(config, types, window),
        "rotary": tuple(0 if turn else None for turn in turns),
    }


SMOLLM3 = Architecture(
    name="SmolLM3ForCausalLM",
    model_type="smollm3",
    settings=_settings,
    defaults={"max_position_embeddings": 32768, "tie_word_embeddings": True},
    note="layers without rotary embedding; sliding window",
)
