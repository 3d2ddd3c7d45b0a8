"""GLM-4 as transformers has it (`Glm`, `Glm4`): interleaved rotary embedding of half the channels, fused gate and up.

`Glm4` (GLM-4-0414) has norms on both sides of the blocks, too.
"""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import FUSED, Architecture, Layout, Settings

_FUSED = tuple(FUSED)[1:]
_DEFAULTS = {"max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7, "head_dim": 128}
_NOTE = "interleaved rotary embedding of a part of the channels; fused gate and up"


def _settings(config: Settings) -> Settings:
    parts.no_windows(config)
    return {
        "rope": parts.rope(config, rotary_fraction=0.5, partial=True, interleaved=True),
        "hidden_act": parts.activation(config),
        "qkv_bias": read.flag(config, "attention_bias", True),
    }


def _sandwich(config: Settings) -> Settings:
    return _settings(config) | {"norm_placement": "both"}


GLM = Architecture(
    name="GlmForCausalLM",
    model_type="glm",
    settings=_settings,
    defaults={**_DEFAULTS, "num_key_value_heads": 2},
    layout=Layout(fused=_FUSED),
    note=_NOTE,
)
GLM4 = Architecture(
    name="Glm4ForCausalLM",
    model_type="glm4",
    settings=_sandwich,
    defaults={**_DEFAULTS, "num_key_value_heads": 2},
    layout=Layout(
        leaves={
            "attention_output_norm": "post_self_attn_layernorm",
            "mlp_output_norm": "post_mlp_layernorm",
        },
        fused=_FUSED,
    ),
    note=f"norms on both sides; {_NOTE}",
)
