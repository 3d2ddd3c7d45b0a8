"""From the canonical form of a model to the form that runs: fused projections, weights as the backend wants them."""

from typing import Literal

import jax
import jax.numpy as jnp

from specjax.errors import ConfigError
from specjax.models.layers import MLP, Attention, DecoderLayer
from specjax.models.llama import Llama, LlamaModel
from specjax.pallas import dispatch
from specjax.quant import view
from specjax.quant.linear import QuantizedLinear

Dequantize = Literal["auto", "load", "never"]


def prepare(model: Llama, backend: dispatch.Backend = "auto", dequantize: Dequantize = "auto") -> Llama:
    """A model that computes the same, arranged for running.

    Projections that share their input are fused (qkv, gate/up) where their forms allow it. What happens to quantized
    weights is a policy of the backend: XLA has no kernel that multiplies 4-bit codes well, so on CPUs ("auto", "load")
    weight-only linears become dense in the compute dtype, and linears with integer activations keep their integer
    arithmetic over decoded int8 codes. "never" keeps the codes; other schemes can then be viewed over the same arrays.

    Raises:
        ConfigError: unknown backend or policy.
    """
    if dequantize not in ("auto", "load", "never"):
        raise ConfigError(f"{dequantize=}: supported are auto, load, never")
    at_load = dequantize == "load" or (
        dequantize == "auto" and backend in ("auto", "xla") and jax.default_backend() == "cpu"
    )
    model = view.with_backend(model, backend)

    def runtime(linear):
        if not isinstance(linear, QuantizedLinear) or not at_load:
            return linear
        if linear.scheme.activations is None:
            return view.dequantized(linear, model.dtype)
        return view.expanded(linear)

    layers = [_prepare_layer(layer, runtime) for layer in model.model.layers]
    inner = LlamaModel(model.model.embed_tokens, layers, model.model.norm)
    head = None if model.lm_head is None else runtime(model.lm_head)
    return Llama(model.config, inner, head)


def _prepare_layer(layer: DecoderLayer, runtime) -> DecoderLayer:
    """One decoder layer with fused projections; `runtime` maps a linear to its run-time form."""
    old, mlp = layer.self_attn, layer.mlp
    attention = Attention(old.config, runtime(old.o_proj))
    attention.qkv_proj, (attention.q_proj, attention.k_proj, attention.v_proj) = _fused(
        old.qkv_proj, (old.q_proj, old.k_proj, old.v_proj), runtime
    )
    feed_forward = MLP(runtime(mlp.down_proj))
    feed_forward.gate_up_proj, (feed_forward.gate_proj, feed_forward.up_proj) = _fused(
        mlp.gate_up_proj, (mlp.gate_proj, mlp.up_proj), runtime
    )
    return DecoderLayer(
        attention, feed_forward, layer.input_layernorm, layer.post_attention_layernorm
    )


def _fused(done, parts, runtime):
    """(fused linear, Nones), or (None, parts) where the parts cannot be fused."""
    if done is not None:
        return runtime(done), (None,) * len(parts)
    parts = tuple(runtime(part) for part in parts)
    fused = view.fuse(parts)
    return (None, parts) if fused is None else (fused, (None,) * len(parts))


def weight_bytes(model) -> int:
    """Bytes of all arrays of a module; 4-bit codes count half a byte."""
    total = 0.0
    for leaf in jax.tree.leaves(model):
        bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else None
        total += leaf.size * (bits / 8 if bits else leaf.dtype.itemsize)
    return round(total)
