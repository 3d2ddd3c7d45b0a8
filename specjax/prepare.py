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
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        Attention(
            attention.config,
            o_proj=runtime(attention.o_proj),
            **_fused(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", runtime),
        ),
        MLP(
            down_proj=runtime(mlp.down_proj),
            **_fused(mlp, ("gate_proj", "up_proj"), "gate_up_proj", runtime),
        ),
        layer.input_layernorm,
        layer.post_attention_layernorm,
    )


def _fused(module, names: tuple[str, ...], fused_name: str, runtime) -> dict:
    """The projections of a module in run-time form: one fused linear, or all parts where they cannot be fused."""
    fused = getattr(module, fused_name)
    if fused is not None:
        return {fused_name: runtime(fused)}
    parts = {name: runtime(getattr(module, name)) for name in names}
    fused = view.fuse(tuple(parts.values()))
    return parts if fused is None else {fused_name: fused}


def weight_bytes(model) -> int:
    """Bytes of all arrays of a module; 4-bit codes count half a byte."""
    total = 0.0
    for leaf in jax.tree.leaves(model):
        bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else None
        total += leaf.size * (bits / 8 if bits else leaf.dtype.itemsize)
    return round(total)
