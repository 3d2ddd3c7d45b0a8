"""Phi-3 and Phi-4-mini: fused projections in files, rotary embedding of a part of the channels, longrope."""

from specjax.config.architectures import parts
from specjax.config.architectures.base import FUSED, Architecture, Layout, Settings


def _settings(config: Settings) -> Settings:
    # transformers gives the field beside the rope object precedence, and Phi3Config always has it.
    config = {"original_max_position_embeddings": 4096, **config}
    return {
        "rope": parts.rope(config, partial=True, renamed={"yarn": "longrope"}),
        "hidden_act": parts.activation(config),
        "windows": parts.same_window(config, default=None),
    }


PHI3 = Architecture(
    name="Phi3ForCausalLM",
    model_type="phi3",
    settings=_settings,
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    layout=Layout(fused=tuple(FUSED)),
    note="fused projections; partial rotary embedding; sliding window",
)
