"""Quantizes a model layer by layer: each layer is calibrated on what the quantized layers before it
output.
"""

import dataclasses
import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from specjax.errors import ConfigError
from specjax.models import layers as nn
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.models.norms import LayerNorm
from specjax.quant import view
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import Scheme
from specjax.quantize import gptq, layerwise, rtn, smoothquant
from specjax.quantize import recipe as recipes
from specjax.quantize.layerwise import SITES, SiteStatistics
from specjax.quantize.recipe import Recipe
from specjax.quantize.workdir import WorkDir

_log = logging.getLogger(__name__)


def quantize(
    model: Llama,
    recipe: Recipe,
    windows: Int[np.ndarray, "S T"] | None = None,
    *,
    work: WorkDir | None = None,
    batch_size: int = 4,
    progress: bool = False,
) -> Llama:
    """The model with its decoder layers quantized; everything else is shared with `model`.

    Deterministic: the same model, recipe and windows give the same codes.

    Args:
        model: dense, not `prepare`d; any float dtype (the arithmetic is float32).
        recipe: what to do.
        windows: calibration tokens; needed where the recipe calibrates.
        work: where finished layers are kept; those it holds already are not computed again.
        batch_size: windows that run together.
        progress: show a bar.

    Raises:
        ConfigError: a group size does not divide a width, calibration is missing, or the model is
            not dense.
    """
    recipes.check_model(recipe, model.config)
    if recipe.needs_calibration and windows is None:
        raise ConfigError(
            f"{'smoothing' if recipe.smooth else recipe.rounding} needs calibration text: give "
            "calibration_file, or use method='rtn'"
        )
    calibrated = windows if recipe.needs_calibration else None
    layers = []
    steps = _finished(model, recipe, work)
    hidden = None if work is None else work.load_hidden(len(steps))
    if calibrated is not None and hidden is None:
        steps, hidden = [], layerwise.embed(model, calibrated)
    rest = model.model.layers[len(steps) :]
    bar = tqdm(rest, desc="quantize", unit="layer", disable=not progress, initial=len(steps))
    layers = list(steps)
    for layer in bar:
        new, hidden = _quantize_layer(layer, recipe, hidden, batch_size, len(layers))
        if work is not None:
            norms = {name: np.asarray(value) for name, value in _norm_arrays(new).items()}
            work.save_layer(len(layers), layerwise.linears(new), norms, hidden)
        layers.append(new)
    inner = model.model.having(layers=layers)
    quantized = Llama(model.config, inner, model.lm_head, model.depth)
    return quantized if recipe.head is None else round_head(quantized, recipe.head)


def round_head(model: Llama, scheme: Scheme) -> Llama:
    """The model with its output head rounded to nearest per channel; a head that is the embedding becomes its own."""
    stored, bias = model.lm_head, None
    if stored is None:
        weight = model.model.embed_tokens.weight[...].astype(jnp.float32)
    else:
        weight = llama.dense_weight(stored, jnp.float32)
        bias = None if stored.bias is None else stored.bias[...].astype(jnp.float32)
    head = rtn.quantize(weight, scheme, bias=bias, name="lm_head")
    config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return Llama(config, model.model, head, model.depth)


def round_layer(layer: nn.DecoderLayer, recipe: Recipe, prefix: str) -> nn.DecoderLayer:
    """A layer with its linears rounded to nearest, for loading, where nothing is calibrated.

    Linears that are quantized already are decoded first; `prefix` names the layer in errors.
    """

    def rounded(name: str, linear) -> QuantizedLinear:
        if isinstance(linear, QuantizedLinear):
            linear = Linear(linear.dequantize(jnp.float32), linear.bias)
        return quantize_linear(linear, recipe, None, f"{prefix}.{name}")

    return layerwise.with_linears(layer, rounded)


def _finished(model: Llama, recipe: Recipe, work: WorkDir | None) -> list[nn.DecoderLayer]:
    """Layers that an earlier run finished."""
    done = []
    for index in range(0 if work is None else work.finished_layers()):
        layer = model.model.layers[index]
        names = list(layerwise.linears(layer))
        stored, norms = work.load_layer(index, names, recipe.scheme, recipe.group_size)
        layer = layerwise.with_linears(layer, lambda name, _: stored[name])  # noqa: B023
        done.append(_with_norm_arrays(layer, norms))
    if done:
        _log.info("%d layers were finished by an earlier run", len(done))
    return done


def _quantize_layer(
    layer: nn.DecoderLayer,
    recipe: Recipe,
    hidden: np.ndarray | None,
    batch_size: int,
    index: int,
) -> tuple[nn.DecoderLayer, np.ndarray | None]:
    """The quantized layer, and what it outputs for the calibration inputs."""
    layer = _float32(layer)
    found: dict[str, SiteStatistics] = {}
    if recipe.needs_calibration:
        found = layerwise.statistics(layer, hidden, batch_size)
    if recipe.smooth:
        layer, found = smoothquant.smooth(
            *(layer, found, recipe.scheme, recipe.group_size),
            strength=recipe.strength,
            outputs=recipe.smooth_outputs,
        )
    prefix = f"model.layers.{index}"
    rounding = {}
    if recipe.rounding == "gptq":
        rounding = {
            site: gptq.factorize(
                *(np.asarray(seen.gram), recipe.damping, recipe.act_order),
                f"{prefix} ({site} inputs)",
            )
            for site, seen in found.items()
        }
    new = layerwise.with_linears(
        layer,
        lambda name, linear: quantize_linear(
            linear, recipe, rounding.get(SITES[name]), f"{prefix}.{name}"
        ),
    )
    if recipe.needs_calibration:
        hidden = layerwise.advance(_runnable(new), hidden, batch_size)
    return new, hidden


def quantize_linear(
    linear: Linear, recipe: Recipe, factor: gptq.Factor | None, name: str
) -> QuantizedLinear:
    """One dense linear; by GPTQ with a factor, else to nearest. `name` is for errors."""
    weight = linear.weight[...].astype(jnp.float32)
    bias = None if linear.bias is None else linear.bias[...].astype(jnp.float32)
    settings = (recipe.scheme, recipe.group_size)
    shared = dict(clip=recipe.clip, bias=bias, name=name)
    if factor is None:
        return rtn.quantize(weight, *settings, **shared)
    return gptq.quantize(weight, factor, *settings, **shared)


def _float32(layer: nn.DecoderLayer) -> nn.DecoderLayer:
    def cast(name: str, linear) -> Linear:
        if not isinstance(linear, Linear):
            raise ConfigError(f"{name} is quantized already; start from a dense model")
        bias = None if linear.bias is None else linear.bias[...].astype(jnp.float32)
        return Linear(linear.weight[...].astype(jnp.float32), bias)

    arrays = {name: value.astype(jnp.float32) for name, value in _norm_arrays(layer).items()}
    return _with_norm_arrays(layerwise.with_linears(layer, cast), arrays)


def _norm_arrays(layer: nn.DecoderLayer) -> dict[str, Any]:
    """Weights of the layer's norms by attribute, and biases by attribute and ".bias"."""
    found = {}
    for name, norm in layer.norms().items():
        found[name] = norm.weight[...]
        if isinstance(norm, LayerNorm):
            found[f"{name}.bias"] = norm.bias[...]
    return found


def _with_norm_arrays(layer: nn.DecoderLayer, arrays: dict[str, Any]) -> nn.DecoderLayer:
    """The layer with the arrays of `_norm_arrays`."""
    norms = {}
    for name, norm in layer.norms().items():
        weight = jnp.asarray(arrays[name])
        if isinstance(norm, LayerNorm):
            norms[name] = LayerNorm(weight, jnp.asarray(arrays[f"{name}.bias"]), norm.eps)
        else:
            norms[name] = nn.RMSNorm(weight, norm.eps, norm.centered, norm.offset)
    return layer.having(**norms)


def _runnable(layer: nn.DecoderLayer) -> nn.DecoderLayer:
    """The layer with weights decoded once for many batches; it computes the same."""

    def decoded(_: str, linear: QuantizedLinear):
        if linear.scheme.activations is None:
            return view.dequantized(linear, jnp.float32)
        return view.expanded(linear)

    return layerwise.with_linears(layer, decoded)
