"""SmoothQuant: moves outliers from activations into weights, feature by feature, without changing
the function.

Xiao et al., arXiv 2211.10438. Feature j of a linear's input is divided by s_j = amax(x_j)^a /
amax(W_j)^(1 - a) and column j of its weight multiplied by it; the division is folded into what
produces the input: a norm's gain, the rows of v_proj (in front of o_proj, one factor per value
feature for all query heads that share it) or of up_proj (in front of down_proj).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from specjax.config import ModelConfig
from specjax.errors import ConfigError
from specjax.models import layers as nn
from specjax.models.norms import LayerNorm, Norm
from specjax.quant import activations
from specjax.quant.dense_linear import Linear
from specjax.quant.rotation import RotatedInput
from specjax.quant.scheme import Scheme
from specjax.quantize import rtn
from specjax.quantize.layerwise import SITES, SiteStatistics, linears, with_linears

# Candidates of the search; SmoothQuant uses 0.5, DeepCompressor and SpecMQuant's W8A8 checkpoints
# 0.85.
STRENGTHS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.75, 0.85)
_SMALLEST = 1e-5


def factors(
    input_amax: Float[Array, "K"], weight_amax: Float[Array, "K"], strength: float
) -> Float[Array, "K"]:
    """s_j; 1 for features that are never active or never read."""
    usable = (input_amax > _SMALLEST) & (weight_amax > _SMALLEST)
    s = jnp.maximum(input_amax, _SMALLEST) ** strength
    s = s / jnp.maximum(weight_amax, _SMALLEST) ** (1 - strength)
    return jnp.where(usable, jnp.clip(s, 1e-4, 1e4), 1.0)


def best_strength(
    weights: list[Float[Array, "_ K"]], statistics: SiteStatistics, scheme: Scheme, group_size: int
) -> float | None:
    """The strength of `STRENGTHS` with the smallest output error on the recorded rows; None if no
    smoothing is best.

    Errors are relative to each row's output: a few rows (the first tokens of a text) are far larger
    than all others and would decide alone.
    """
    weight = jnp.concatenate(weights)
    amax = jnp.max(jnp.abs(weight), axis=0)
    exact = statistics.rows @ weight.T
    power = jnp.mean(exact**2, axis=1) + _SMALLEST**2

    def error(strength: float | None) -> float:
        s = jnp.ones_like(amax) if strength is None else factors(statistics.amax, amax, strength)
        rounded = rtn.quantize(weight * s, scheme, group_size).dequantize(jnp.float32)
        x = statistics.rows / s
        if scheme.activations is not None:
            quantized = activations.quantize(x, scheme.activations)
            x = quantized.codes.astype(jnp.float32) * quantized.scale
        return float(jnp.mean(jnp.mean((x @ rounded.T - exact) ** 2, axis=1) / power))

    return min((None, *STRENGTHS), key=error)


def smooth(
    layer: nn.DecoderLayer,
    statistics: dict[str, SiteStatistics],
    scheme: Scheme,
    group_size: int,
    strength: float | None = 0.5,
    outputs: bool = False,
) -> tuple[nn.DecoderLayer, dict[str, SiteStatistics]]:
    """The same layer with smoothed inputs, and the statistics of those inputs.

    Args:
        layer: dense, float32.
        statistics: of the layer's sites.
        scheme, group_size: what the search for a strength quantizes to.
        strength: migration strength in [0, 1], or None to search it per site.
        outputs: also smooth the inputs of o_proj and down_proj (not where rotated at run time).
    """
    dense = {
        name: linear.weight[...].astype(jnp.float32) for name, linear in linears(layer).items()
    }
    biases = {
        name: None if linear.bias is None else linear.bias[...]
        for name, linear in linears(layer).items()
    }
    before = {"qkv": layer.input_layernorm, "gate_up": layer.post_attention_layernorm}
    shrunk = {}
    smoothed = dict(statistics)
    rotated = {
        "o": isinstance(layer.self_attn.o_proj, RotatedInput),
        "down": isinstance(layer.mlp.down_proj, RotatedInput),
    }
    for site, found in statistics.items():
        if site not in before and (not outputs or rotated[site]):
            continue
        names = [name for name in dense if SITES[name] == site]
        weights = [dense[name] for name in names]
        a = best_strength(weights, found, scheme, group_size) if strength is None else strength
        if a is None:
            continue
        amax, weight_amax = found.amax, jnp.max(jnp.abs(jnp.concatenate(weights)), axis=0)
        if site == "o":
            amax, weight_amax = (_shared(layer, values) for values in (amax, weight_amax))
        s = factors(amax, weight_amax, a)
        if site in before:
            shrunk[site] = s
        else:
            _divide_producer(site, layer, dense, biases, s)
        for name in names:
            dense[name] = dense[name] * s
        smoothed[site] = SiteStatistics(
            gram=found.gram / (s[:, None] * s), amax=found.amax / s, rows=found.rows / s
        )
    result = with_linears(layer, lambda name, _: Linear(dense[name], biases[name]))
    for attribute, site in (("input_layernorm", "qkv"), ("post_attention_layernorm", "gate_up")):
        if site in shrunk:
            setattr(result, attribute, _divided(before[site], shrunk[site]))
    return result, smoothed


def check_architecture(config: ModelConfig, outputs: bool) -> None:
    """Refuses models whose linears read something that cannot be divided feature by feature.

    Raises:
        ConfigError: no norm stands before the blocks, or a nonlinearity stands before down_proj.
    """
    if config.norm_placement == "after":
        raise ConfigError(
            f"{config.architecture} cannot be smoothed: norm_placement = 'after' leaves no norm before its linears "
            "that could take the factors; use method='gptq' or 'rtn'"
        )
    if outputs and not config.gated_mlp:
        raise ConfigError(
            f"{config.architecture} cannot be smoothed in front of down_proj: gated_mlp = false leaves a nonlinearity "
            "between it and up_proj; use method='gptq' or 'rtn'"
        )


def _divided(norm: Norm, s: Float[Array, "K"]) -> Norm:
    """The norm with its outputs divided by s."""
    if isinstance(norm, LayerNorm):
        return LayerNorm(norm.weight[...] / s, norm.bias[...] / s, norm.eps)
    return norm.with_gain(norm.gain / s)


def _shared(layer: nn.DecoderLayer, values: Float[Array, "K"]) -> Float[Array, "K"]:
    """Maxima over the query heads that read the same value head, spread over those heads again."""
    config = layer.self_attn.config
    grouped = values.reshape(config.num_kv_heads, -1, config.head_dim)
    return jnp.broadcast_to(jnp.max(grouped, axis=1, keepdims=True), grouped.shape).reshape(-1)


def _divide_producer(site: str, layer: nn.DecoderLayer, dense, biases, s) -> None:
    """Folds 1 / s into the rows that produce a site's input."""
    producer = "self_attn.v_proj" if site == "o" else "mlp.up_proj"
    if site == "o":
        config = layer.self_attn.config
        s = s.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].reshape(-1)
    dense[producer] = dense[producer] / s[:, None]
    if biases[producer] is not None:
        biases[producer] = biases[producer] / s
