"""One decoder layer at a time: its linears by name, its forward pass, and what its linears see on
calibration inputs.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specjax import errors
from specjax.models import cache as kv
from specjax.models import layers as nn
from specjax.models.llama import Llama
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear
from specjax.quant.rotation import RotatedInput

# Linears by Hugging Face name, with the site that feeds them; linears of one site see the same
# inputs.
SITES = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "down",
}
_SAMPLE_ROWS = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """Inputs of one site over calibration tokens.

    Attributes:
        gram: sum of x x^T.
        amax: largest magnitude of each feature.
        rows: some of the inputs, evenly spaced.
    """

    gram: Float[Array, "K K"]
    amax: Float[Array, "K"]
    rows: Float[Array, "R K"]


def linears(layer: nn.DecoderLayer) -> dict[str, Any]:
    """The layer's linears by their names in `SITES`, outside rotations stripped.

    Raises:
        ConfigError: projections are fused (the model went through `prepare`).
    """
    if layer.self_attn.q_proj is None or layer.mlp.up_proj is None:
        raise errors.ConfigError("the model's projections are fused; quantize it before `prepare`")
    found = {}
    for name in SITES:
        module, attribute = name.split(".")
        linear = getattr(getattr(layer, module), attribute)
        if linear is not None:
            found[name] = linear.linear if isinstance(linear, RotatedInput) else linear
    return found


def with_linears(layer: nn.DecoderLayer, replace: Callable[[str, Any], Any]) -> nn.DecoderLayer:
    """A new layer with `replace(name, linear)` in the place of each linear; rotations stay around
    them.
    """

    def replaced(name: str):
        module, attribute = name.split(".")
        linear = getattr(getattr(layer, module), attribute)
        if linear is None:  # a feed-forward without gate
            return None
        if isinstance(linear, RotatedInput):
            return linear.with_linear(replace(name, linear.linear))
        return replace(name, linear)

    new = {name.split(".")[1]: replaced(name) for name in SITES}
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    return layer.having(
        self_attn=layer.self_attn.having(**{name: new[name] for name in attention}),
        mlp=layer.mlp.having(**{name: new[name] for name in new if name not in attention}),
    )


def decoded(model: Llama) -> Llama:
    """The model with its quantized linears dense, in float32; activations are not rounded."""

    def dense(name: str, linear: Any) -> Any:
        if not isinstance(linear, QuantizedLinear):
            return linear
        return Linear(linear.dequantize(jnp.float32), linear.bias)

    layers = [with_linears(layer, dense) for layer in model.model.layers]
    inner = model.model.having(layers=layers)
    return Llama(model.config, inner, dense("lm_head", model.lm_head), model.depth)


class _Tap:
    """Stands in for a linear while a layer is traced, and keeps its input."""

    def __init__(self, linear: Any, inputs: dict[str, Array], site: str):
        self.linear, self.inputs, self.site = linear, inputs, site

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        self.inputs[self.site] = x
        return self.linear(x)


def _forward(layer: nn.DecoderLayer, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config, (batch, length, _) = layer.self_attn.config, hidden.shape
    start = jnp.zeros((batch,), jnp.int32)
    block = nn.causal_block(jnp.zeros((batch, length), jnp.int32), start, start + length)
    rope = nn.tables_of(layer, nn.position_tables(config, block))
    cache = kv.init(config, batch, length, hidden.dtype)
    return layer(hidden, block, rope, cache.keys[0], cache.values[0])[0]


forward = jax.jit(_forward)
"""One layer over a batch of equally long sequences, without an outside cache."""


@jax.jit
def observe(
    layer: nn.DecoderLayer, hidden: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], dict[str, SiteStatistics]]:
    """`forward` of a dense layer, and what its sites saw; the network computes the inputs that are
    recorded.
    """
    inputs: dict[str, Array] = {}
    tapped = with_linears(layer, lambda name, linear: _Tap(linear, inputs, SITES[name]))
    out = _forward(tapped, hidden)
    return out, {site: _statistics(x) for site, x in inputs.items()}


def _statistics(x: Float[Array, "B T K"]) -> SiteStatistics:
    step = max(1, x.shape[1] // _SAMPLE_ROWS)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return SiteStatistics(
        gram=jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST),
        amax=jnp.max(jnp.abs(rows), axis=0),
        rows=x[:, ::step].reshape(-1, x.shape[-1]).astype(jnp.float32),
    )


def _merge(first: SiteStatistics, second: SiteStatistics) -> SiteStatistics:
    return SiteStatistics(
        gram=first.gram + second.gram,
        amax=jnp.maximum(first.amax, second.amax),
        rows=jnp.concatenate([first.rows, second.rows]),
    )


def batches(hidden: np.ndarray, batch_size: int) -> Iterator[tuple[slice, Array]]:
    """Slices of the first axis and their values on the device."""
    for start in range(0, len(hidden), batch_size):
        part = slice(start, min(start + batch_size, len(hidden)))
        yield part, jnp.asarray(hidden[part])


def statistics(
    layer: nn.DecoderLayer, hidden: np.ndarray, batch_size: int
) -> dict[str, SiteStatistics]:
    """What the sites of a dense layer see over all calibration sequences [S, T, D]."""
    results = (observe(layer, x)[1] for _, x in batches(hidden, batch_size))
    return functools.reduce(lambda a, b: {site: _merge(a[site], b[site]) for site in a}, results)


def advance(layer: nn.DecoderLayer, hidden: np.ndarray, batch_size: int) -> np.ndarray:
    """Outputs of a layer for all sequences [S, T, D]."""
    out = np.empty_like(hidden)
    for part, x in batches(hidden, batch_size):
        out[part] = forward(layer, x)
    return out


def embed(model: Llama, tokens: np.ndarray) -> np.ndarray:
    """Float32 inputs of the first layer for token windows [S, T]."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return np.asarray(model.embed(tokens, positions).astype(jnp.float32))
