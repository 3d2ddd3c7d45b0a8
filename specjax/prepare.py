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


def prepare(
    model: Llama, backend: dispatch.Backend = "auto", dequantize: Dequantize = "auto"
) -> Llama:
    """A model that computes the same, arranged for running; see `Preparation`."""
    preparation = Preparation(backend, dequantize, model.dtype)
    layers = [preparation.layer(layer) for layer in model.model.layers]
    inner = LlamaModel(model.model.embed_tokens, layers, model.model.norm)
    return Llama(model.config, inner, preparation.linear(model.lm_head))


class Preparation:
    """Turns canonical layers into run-time ones, one at a time, so that a model need never exist in both forms.

    Projections that share their input are fused (qkv, gate/up) where their forms allow it. What happens to quantized
    weights is a policy of the backend: XLA has no kernel that multiplies 4-bit codes well, so on CPUs ("auto", "load")
    weight-only linears become dense in the compute dtype, and linears with integer activations keep their integer
    arithmetic over decoded int8 codes. "never" keeps the codes; other schemes can then be viewed over the same arrays.

    Raises:
        ConfigError: unknown backend or policy.
    """

    def __init__(self, backend: dispatch.Backend, dequantize: Dequantize, dtype):
        if dequantize not in ("auto", "load", "never"):
            raise ConfigError(f"{dequantize=}: supported are auto, load, never")
        on_cpu = backend in ("auto", "xla") and jax.default_backend() == "cpu"
        self._at_load = dequantize == "load" or (dequantize == "auto" and on_cpu)
        self._backend, self._dtype = backend, dtype

    def linear(self, linear):
        """A linear, or a module around one, in run-time form; None stays None."""
        linear = view.with_backend(linear, self._backend)
        return jax.tree.map(
            self._runtime, linear, is_leaf=lambda node: isinstance(node, QuantizedLinear)
        )

    def _runtime(self, node):
        if not isinstance(node, QuantizedLinear) or not self._at_load:
            return node
        if node.scheme.activations is None:
            return view.dequantized(node, self._dtype)
        return view.expanded(node)

    def layer(self, layer: DecoderLayer) -> DecoderLayer:
        """A decoder layer in run-time form, its projections fused."""
        attention, mlp = layer.self_attn, layer.mlp
        return DecoderLayer(
            Attention(
                attention.config,
                o_proj=self.linear(attention.o_proj),
                **self._fused(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ),
            MLP(
                down_proj=self.linear(mlp.down_proj),
                **self._fused(mlp, ("gate_proj", "up_proj"), "gate_up_proj"),
            ),
            layer.input_layernorm,
            layer.post_attention_layernorm,
        )

    def _fused(self, module, names: tuple[str, ...], fused_name: str) -> dict:
        """The projections of a module: one fused linear, or all parts where they cannot be fused."""
        fused = getattr(module, fused_name)
        if fused is not None:
            return {fused_name: self.linear(fused)}
        parts = {name: self.linear(getattr(module, name)) for name in names}
        fused = view.fuse(tuple(parts.values()))
        return parts if fused is None else {fused_name: fused}


def weight_bytes(model) -> int:
    """Bytes of all arrays of a module; 4-bit codes count half a byte."""
    total = 0.0
    for leaf in jax.tree.leaves(model):
        bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else None
        total += leaf.size * (bits / 8 if bits else leaf.dtype.itemsize)
    return round(total)
