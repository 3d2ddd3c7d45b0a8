"""From the canonical form of a model to the form that runs: fused projections, weights as the backend wants them."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from specjax.errors import ConfigError
from specjax.models.layers import Attention, DecoderLayer
from specjax.models.llama import Llama
from specjax.pallas import device, dispatch
from specjax.quant import packed_linear, view
from specjax.quant.linear import QuantizedLinear
from specjax.quant.packed_linear import PackedLinear

Dequantize = Literal["auto", "load", "fold", "never"]


def prepare(
    model: Llama, backend: dispatch.Backend = "auto", dequantize: Dequantize = "auto"
) -> Llama:
    """A model that computes the same, arranged for running; see `Preparation`."""
    preparation = Preparation(backend, dequantize, model.dtype)
    layers = [preparation.layer(layer) for layer in model.model.layers]
    inner = model.model.having(layers=layers)
    return Llama(model.config, inner, preparation.linear(model.lm_head), model.depth)


class Preparation:
    """Turns canonical layers into run-time ones, one at a time, so that a model need never exist in both forms.

    Projections that share their input are fused (qkv, gate/up) where their forms allow it. What happens to quantized
    weights is a policy of the backend: XLA has no kernel that multiplies 4-bit codes well, so on CPUs ("auto", "load")
    weight-only linears become dense in the compute dtype, and linears with integer activations keep their integer
    arithmetic over decoded int8 codes. "never" keeps the codes; other schemes can then be viewed over the same arrays.
    "fold" keeps them too, with the two levels of QQQ's scales multiplied into one (`view.folded`).
    Where there is a GPU, codes that a kernel of the backend reads there are packed for it. Others would be decoded on
    every call: "auto" decodes them at load, too.

    Raises:
        ConfigError: unknown backend or policy.
    """

    def __init__(self, backend: dispatch.Backend, dequantize: Dequantize, dtype):
        if dequantize not in get_args(Dequantize):
            raise ConfigError(f"{dequantize=}: supported are {', '.join(get_args(Dequantize))}")
        gpu = device.current()
        policy = dispatch.policy(backend)
        no_gpu = gpu is None and jax.default_backend() == "cpu"
        on_cpu = policy.backend in ("auto", "xla") and no_gpu
        self._packs = policy.backend != "xla" and gpu is not None
        self._at_load = dequantize == "load" or (dequantize == "auto" and on_cpu)
        self._without_kernel = self._packs and policy.backend == "auto" and dequantize == "auto"
        self._folds = dequantize == "fold"
        self._backend, self._dtype = backend, dtype

    def linear(self, linear):
        """A linear, or a module around one, in run-time form; None stays None."""
        return self._packed(self._decoded(linear))

    def _decoded(self, linear):
        """The linear with its codes decoded, if the policy says so."""
        return _map_quantized(self._decode, view.with_backend(linear, self._backend))

    def _packed(self, linear):
        """The linear with its codes packed, if the kernels can run it."""
        if not self._packs or self._at_load:
            return linear
        return _map_quantized(
            lambda node: packed_linear.pack(node) if packed_linear.has_kernel(node) else node,
            linear,
        )

    def _decode(self, node: QuantizedLinear):
        if self._folds:
            return view.folded(node)
        if not self._at_load and not (self._without_kernel and not packed_linear.has_kernel(node)):
            return node
        if node.scheme.activations is None:
            return view.dequantized(node, self._dtype)
        return view.expanded(node)

    def layer(self, layer: DecoderLayer) -> DecoderLayer:
        """A decoder layer in run-time form, its projections fused."""
        attention, mlp = layer.self_attn, layer.mlp
        gated = mlp.gate_proj is not None or mlp.gate_up_proj is not None
        inner = ("gate_proj", "up_proj") if gated else ("up_proj",)
        return layer.having(
            self_attn=attention.having(
                o_proj=self.linear(attention.o_proj),
                # There is no Triton kernel of attention: it takes what suits it.
                backend=_without_triton(self._backend),
                **self._fused(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ),
            mlp=mlp.having(
                down_proj=self.linear(mlp.down_proj), **self._fused(mlp, inner, "gate_up_proj")
            ),
        )

    def _fused(self, module, names: tuple[str, ...], fused_name: str) -> dict:
        """The projections of a module: one fused linear, or all parts where they cannot be fused (or are one)."""
        fused = getattr(module, fused_name)
        if fused is not None:
            return {fused_name: self.linear(fused)}
        parts = {name: self._decoded(getattr(module, name)) for name in names}
        fused = view.fuse(tuple(parts.values())) if len(parts) > 1 else None
        if fused is not None:
            return {fused_name: self._packed(fused), **dict.fromkeys(names)}
        return {name: self._packed(part) for name, part in parts.items()}


def with_backend[Module](module: Module, backend: dispatch.Backend) -> Module:
    """The module with its attention, and what stands around it, on `backend`; arrays are shared, not copied."""

    def change(node):
        return node.having(backend=backend) if isinstance(node, Attention) else node

    return jax.tree.map(change, module, is_leaf=lambda node: isinstance(node, Attention))


def _without_triton(backend: dispatch.Backend) -> dispatch.Backend:
    """The backend of attention, for which there is no Triton kernel: where that is meant, it takes what suits it."""
    policy = dispatch.policy(backend)
    if policy.backend != "triton":
        return backend
    return dataclasses.replace(policy, backend="auto") if policy.quarantine else "auto"


def _map_quantized(change, module):
    """Applies `change` to the quantized linears of a module; a linear is a module too."""
    return jax.tree.map(
        lambda node: change(node) if isinstance(node, QuantizedLinear) else node,
        module,
        is_leaf=lambda node: isinstance(node, QuantizedLinear | PackedLinear),
    )


def weight_bytes(model) -> int:
    """Bytes of all arrays of a module; 4-bit codes count half a byte."""
    total = 0.0
    for leaf in jax.tree.leaves(model):
        bits = jnp.iinfo(leaf.dtype).bits if jnp.issubdtype(leaf.dtype, jnp.integer) else None
        total += leaf.size * (bits / 8 if bits else leaf.dtype.itemsize)
    return round(total)
