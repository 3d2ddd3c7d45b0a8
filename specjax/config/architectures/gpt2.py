"""GPT-2: learned positions, LayerNorm, a feed-forward without gate, weights stored [in, out]."""

from specjax.config import fields as read
from specjax.config.architectures import parts
from specjax.config.architectures.base import FUSED, Architecture, Layout, Settings
from specjax.errors import ConfigError


def _settings(config: Settings) -> Settings:
    parts.refuse(config, "add_cross_attention", why="only decoders")
    hidden, heads = read.size(config, "hidden_size"), read.size(config, "num_attention_heads")
    if hidden % heads:
        raise ConfigError(f"n_embd = {hidden} is not a multiple of n_head = {heads}")
    scale = (hidden // heads) ** -0.5 if read.flag(config, "scale_attn_weights", True) else 1.0
    scales: tuple[float, ...] = ()
    if read.flag(config, "scale_attn_by_inverse_layer_idx"):
        count = read.size(config, "num_hidden_layers")
        scales = tuple(1 / (index + 1) for index in range(count))
    return {
        "rotary": (None,) * read.size(config, "num_hidden_layers"),
        "learned_positions": True,
        "hidden_act": parts.activation(config, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "norm_kind": "layer",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "query_scale": scale,
        "layer_scales": scales,
        # The tables of positions and of the keys' heads; GPT-2 states neither.
        "num_kv_heads": heads,
        "intermediate_size": read.size(config, "n_inner", 4 * hidden),
    }


GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    settings=_settings,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "rms_norm_eps": "layer_norm_epsilon",
        "intermediate_size": "n_inner",
    },
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    layout=Layout(
        prefixes={
            "model.layers": "transformer.h",
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.norm": "transformer.ln_f",
        },
        leaves={
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.qkv_proj": "attn.c_attn",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fused=tuple(FUSED)[:1],
        transposed=True,
        buffers=r".*\.attn\.(bias|masked_bias)",
    ),
    note="learned positions; LayerNorm; no gate",
)
