"""What training for routed depth changes: low-rank updates of the q, k and v projections, and the routers."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from specjax.config import ModelConfig
from specjax.config.depth import DepthConfig
from specjax.depth import checkpoint
from specjax.depth import router as routing
from specjax.depth.routed import Routed
from specjax.depth.router import Router
from specjax.errors import ConfigError
from specjax.models import layers
from specjax.models.llama import Llama, dense_weight
from specjax.quant.dense_linear import Linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class LoRA(nnx.Module):
    """An update of a linear, y = (x A^T) B^T, in float32; without the usual scale in front (D-LLM)."""

    def __init__(self, a: Float[Array, "R K"], b: Float[Array, "N R"]):
        self.a, self.b = nnx.Param(a), nnx.Param(b)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        return (x.astype(jnp.float32) @ self.a[...].T) @ self.b[...].T

    def matrix(self) -> Float[Array, "N K"]:
        """What is added to the linear's weight."""
        return self.b[...] @ self.a[...]


class LayerAdapter(nnx.Module):
    """The updates of one layer."""

    def __init__(self, q_proj: LoRA, k_proj: LoRA, v_proj: LoRA):
        self.q_proj, self.k_proj, self.v_proj = q_proj, k_proj, v_proj


class Adapter(nnx.Module):
    """All that is trained: updates of every layer, and a router for each from the start layer on."""

    def __init__(self, config: DepthConfig, layers: list[LayerAdapter], routers: list[Router]):
        self.config = config
        self.layers, self.routers = nnx.List(layers), nnx.List(routers)


def init(key: Array, model: ModelConfig, config: DepthConfig, rank: int) -> Adapter:
    """An untrained adapter: the updates are zero (B is), and the routers lean towards executing.

    Raises:
        ConfigError: the start layer leaves no layer to route.
    """
    checkpoint.check_fit(config, model.num_layers)
    kv_width = model.num_kv_heads * model.head_dim
    widths = (model.num_heads * model.head_dim, kv_width, kv_width)
    keys = jax.random.split(key, (model.num_layers, len(widths) + 1))

    def lora(key, width):
        a = jax.random.normal(key, (rank, model.hidden_size), jnp.float32) / rank
        return LoRA(a, jnp.zeros((width, rank), jnp.float32))

    adapters = [
        LayerAdapter(*(lora(keys[i, j], width) for j, width in enumerate(widths)))
        for i in range(model.num_layers)
    ]
    routers = [
        routing.init(keys[i, -1], model.hidden_size, config.router_width, config.code_bits)
        for i in range(config.start_layer, model.num_layers)
    ]
    return Adapter(config, adapters, routers)


def check_base(model: Llama) -> None:
    """Raises ConfigError unless the model can be trained and merged: dense projections, in layers like Llama's."""
    settings = ("norm_placement", "windows", "query_scale", "layer_scales", "score_softcap")
    for name in (*settings, "residual_multiplier"):
        default = ModelConfig.__dataclass_fields__[name].default
        found = getattr(model.config, name)
        if found != default and not (name == "windows" and set(found) == {None}):
            raise ConfigError(
                f"{model.config.architecture} with {name} = {found!r}: depth is trained for layers like Llama's"
            )
    for index, layer in enumerate(model.model.layers):
        for name in PROJECTIONS:
            linear = getattr(layer.self_attn, name)
            if not isinstance(linear, Linear):
                found = "fused" if linear is None else type(linear).__name__
                raise ConfigError(
                    f"model.layers.{index}.self_attn.{name} is {found}: depth is trained on a dense model as stored; "
                    "quantize the result with experiments.convert"
                )


def merge(model: Llama, updates: Sequence[LayerAdapter]) -> Llama:
    """The model with the updates added to its projections, rounded once to its dtype.

    Raises:
        ConfigError: see `check_base`.
    """
    check_base(model)
    merged = [_merged(*pair) for pair in zip(model.model.layers, updates, strict=True)]
    inner = model.model.having(layers=merged)
    return Llama(model.config, inner, model.lm_head)


def _merged(layer: layers.DecoderLayer, update: LayerAdapter) -> layers.DecoderLayer:
    attention = layer.self_attn
    projections = {}
    for name in PROJECTIONS:
        linear = getattr(attention, name)
        weight = dense_weight(linear, jnp.float32) + getattr(update, name).matrix()
        bias = None if linear.bias is None else linear.bias[...]
        projections[name] = Linear(weight.astype(linear.weight.dtype), bias)
    return layer.having(self_attn=attention.having(**projections))


def routed(model: Llama, adapter: Adapter) -> Llama:
    """The model with the updates merged and the routers in front of its layers: what is exported and run.

    Raises:
        ConfigError: see `check_base`.
    """
    merged = merge(model, adapter.layers)
    config = dataclasses.replace(model.config, depth=adapter.config)
    depth = Routed(adapter.config, list(adapter.routers))
    return Llama(config, merged.model, merged.lm_head, depth)
