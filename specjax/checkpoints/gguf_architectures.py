"""The architectures of llama.cpp that can be loaded: their tensors by this library's names, their metadata as fields of
a config.json.

llama.cpp rotates neighbouring channels of queries and keys in some architectures; where the Hugging Face model rotates
channels C/2 apart, its converter reorders the rows of q_proj and k_proj (`permuted`). It adds Gemma's 1 to the gains of
norms. What a file does not state, llama.cpp's own constants decide.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Fields = dict[str, Any]
Get = Callable[[str], Any]

GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embed_positions": "position_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "attention_output_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp_output_norm": "post_ffw_norm",
}


@dataclass(frozen=True, kw_only=True)
class GGUFArchitecture:
    """One value of `general.architecture`.

    Attributes:
        model: class of the Hugging Face model.
        fields: fields of its config.json beside the generic ones, given a function that looks up metadata keys below
            the architecture's name (None where there is none).
        permuted: rows of q_proj and k_proj stand in llama.cpp's order.
        fused: linears that may be stored as one, by the name of the fused one in the file.
        partial: a part of the channels may be rotated.
        window: a sliding window means something.
        epsilon: key of the norms' epsilon.
        scales: keys of factors and softcaps that this architecture computes.
    """

    model: str
    fields: Callable[[Get], Fields] = lambda get: {}
    permuted: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    partial: bool = False
    window: bool = False
    epsilon: str = "attention.layer_norm_rms_epsilon"
    scales: tuple[str, ...] = ()


_QKV = {"attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
_GATE_UP = {"ffn_up": ("mlp.gate_proj", "mlp.up_proj")}


_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def _rotary_fraction(get: Get) -> Fields:
    turned = get("rope.dimension_count")
    heads = get("attention.head_count")
    width = get("attention.key_length") or (get("embedding_length") or 0) // (heads or 1)
    return {"partial_rotary_factor": turned / width} if turned and width else {}


def _llama(get: Get) -> Fields:
    window = get("attention.sliding_window")
    if not window:
        return {}
    return {"architectures": ["MistralForCausalLM"], "sliding_window": window}


def _phi3(get: Get) -> Fields:
    return _rotary_fraction(get) | {
        "sliding_window": get("attention.sliding_window") or None,
        "original_max_position_embeddings": get("rope.scaling.original_context_length")
        or get("context_length"),
    }


def _granite(get: Get) -> Fields:
    heads = get("attention.head_count") or 1
    width = get("attention.key_length") or (get("embedding_length") or 0) // heads
    return {
        "attention_multiplier": get("attention.scale") or width**-0.5,
        "embedding_multiplier": get("embedding_scale"),
        "residual_multiplier": get("residual_scale"),
        "logits_scaling": get("logit_scale"),
    }


def _gemma(get: Get, largest: int) -> Fields:
    """`largest` is the number of layers of the one size whose query scale is not that of its heads."""
    heads, hidden = get("attention.head_count"), get("embedding_length")
    by_width = get("block_count") == largest and heads and hidden
    fields = {"query_pre_attn_scalar": hidden / heads if by_width else get("attention.key_length")}
    for name, key in (
        ("sliding_window", "attention.sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if get(key) is not None:
            fields[name] = get(key)
    return fields


def _gemma3(get: Get) -> Fields:
    fields = _gemma(get, largest=62) | {
        "rope_local_base_freq": get("rope.freq_base_swa") or 10000.0
    }
    pattern = get("attention.sliding_window_pattern")
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        fields["sliding_window_pattern"] = pattern
    elif pattern is not None:
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[bool(slides)] for slides in pattern]
    return fields


def _gpt2(get: Get) -> Fields:
    return {
        "layer_norm_epsilon": get("attention.layer_norm_epsilon"),
        "n_inner": get("feed_forward_length"),
    }


ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(model="LlamaForCausalLM", fields=_llama, permuted=True, window=True),
    "qwen2": GGUFArchitecture(model="Qwen2ForCausalLM"),
    "qwen3": GGUFArchitecture(model="Qwen3ForCausalLM"),
    "phi3": GGUFArchitecture(
        model="Phi3ForCausalLM", fields=_phi3, fused=_QKV | _GATE_UP, partial=True, window=True
    ),
    "granite": GGUFArchitecture(
        model="GraniteForCausalLM",
        fields=_granite,
        permuted=True,
        scales=("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
    ),
    "olmo2": GGUFArchitecture(model="Olmo2ForCausalLM"),
    "smollm3": GGUFArchitecture(
        model="SmolLM3ForCausalLM",
        fields=lambda get: {"no_rope_layer_interval": 4},
        permuted=True,
    ),
    "gemma2": GGUFArchitecture(
        model="Gemma2ForCausalLM",
        fields=lambda get: _gemma(get, largest=46),
        window=True,
        scales=_SOFTCAPS,
    ),
    "gemma3": GGUFArchitecture(
        model="Gemma3ForCausalLM", fields=_gemma3, window=True, scales=_SOFTCAPS
    ),
    "gpt2": GGUFArchitecture(
        model="GPT2LMHeadModel",
        fields=_gpt2,
        fused=_QKV,
        epsilon="attention.layer_norm_epsilon",
    ),
    "chatglm": GGUFArchitecture(
        model="GlmForCausalLM", fields=_rotary_fraction, fused=_QKV | _GATE_UP, partial=True
    ),
    "glm4": GGUFArchitecture(
        model="Glm4ForCausalLM", fields=_rotary_fraction, fused=_QKV | _GATE_UP, partial=True
    ),
}


def gguf_name(name: str) -> str:
    """The GGUF name of a parameter; names without one are returned as they are."""
    prefix, _, kind = name.rpartition(".")
    if prefix in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[prefix]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", prefix)
    if match and match[2] in LAYER_NAMES:
        return f"blk.{match[1]}.{LAYER_NAMES[match[2]]}.{kind}"
    return name


def place(file, declared: GGUFArchitecture, name: str) -> tuple[str, tuple[str, ...]]:
    """The GGUF name of a parameter, and the linears that it is fused of, if it is stored so."""
    own = gguf_name(name)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return own, ()
    for fused, members in declared.fused.items():
        if match[2] not in members:
            continue
        # Each member by itself is found by the first, which has a name of its own in any case.
        first = f"blk.{match[1]}.{LAYER_NAMES[members[0]]}.weight"
        if first not in file.names():
            return f"blk.{match[1]}.{fused}.{match[3]}", members
    return own, ()
