"""The same weights in another form: other activations, dense, fused, or as int8 weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import errors
from specjax.pallas import dispatch
from specjax.pallas.matmul import reference
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear
from specjax.quant.packed_linear import PackedLinear
from specjax.quant.scheme import Scheme, WeightSpec, lookup

ARRAYS_ALONG_N = ("codes", "scales", "zeros", "minima", "channel_scales", "bias")


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedLinear | PackedLinear)


def quantized_linears(module: Any) -> list[tuple[str, QuantizedLinear | PackedLinear]]:
    """Quantized linears of a pytree with paths such as `model.layers.0.mlp.up_proj`."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=_is_quantized)
    return [(_path(path), node) for path, node in nodes if _is_quantized(node)]


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def with_scheme[Module](module: Module, scheme: str | Scheme) -> Module:
    """The module's quantized linears under `scheme`'s activations; no array is copied.

    Only linears whose codes the scheme can read change (same kind and bits, and the same second
    level where the scheme names one); others, such as an 8-bit output head beside 4-bit layers,
    stay as they are.

    Raises:
        ConfigError: no linear of the module can run under `scheme`, for example because the model
            is dense.
    """
    scheme = lookup(scheme) if isinstance(scheme, str) else scheme
    found = quantized_linears(module)
    if not any(_readable(linear.scheme.weights, scheme.weights) for _, linear in found):
        raise errors.ConfigError(_no_codes_message(scheme, found))

    def view(node):
        if _is_quantized(node) and _readable(node.scheme.weights, scheme.weights):
            return node.with_activations(scheme.activations)
        return node

    return jax.tree.map(view, module, is_leaf=_is_quantized)


def _readable(stored: WeightSpec, wanted: WeightSpec) -> bool:
    same_codes = (stored.kind, stored.bits) == (wanted.kind, wanted.bits)
    return same_codes and wanted.levels in ("single", stored.levels)


def _no_codes_message(scheme: Scheme, found: list[tuple[str, QuantizedLinear]]) -> str:
    if not found:
        return (
            f"scheme={scheme.name!r} needs quantized weights and this model is dense; quantize it "
            f"first: python -m experiments.convert --scheme={scheme.name}"
        )
    name, linear = found[0]
    return (
        f"scheme={scheme.name!r} cannot read the codes of this model: {name} is "
        f"{linear.scheme.name}. A view changes activations only; other codes need "
        f"python -m experiments.convert --scheme={scheme.name}"
    )


def with_backend[Module](module: Module, backend: dispatch.Backend) -> Module:
    """The module with its quantized linears on `backend`; arrays are shared, not copied.

    Raises:
        SpecjaxError: there is no such backend.
    """
    dispatch.policy(backend)
    return jax.tree.map(
        lambda node: node.with_backend(backend) if _is_quantized(node) else node,
        module,
        is_leaf=_is_quantized,
    )


def dequantized(linear: QuantizedLinear, dtype=jnp.float32) -> Linear:
    """A dense linear with the weights of a weight-only one, inputs in their original order.

    Raises:
        ConfigError: the linear quantizes its inputs, which a dense linear cannot express.
    """
    if linear.scheme.activations is not None:
        raise errors.ConfigError(
            f"scheme={linear.scheme.name!r} quantizes its inputs, a dense linear would not; view "
            "it without activations if that is meant: with_activations(None)"
        )
    bias = None if linear.bias is None else linear.bias.astype(dtype)
    return Linear(linear.dequantize(dtype), bias)


def expanded(linear: QuantizedLinear) -> QuantizedLinear:
    """The same linear with its runtime weight stored: int8 codes, second level applied.

    Zeros are subtracted. It computes the same accumulators and outputs in twice the memory without
    decoding the codes on every call, which is what the XLA backend wants. Linears without integer
    activations, with int8 codes already, or with minima (which int8 codes do not take) come back as
    they are.
    """
    spec = linear.scheme.activations
    fits = spec is not None and spec.kind == "int" and linear.minima is None
    if not fits or linear.scheme.weights.bits == 8:
        return linear
    codes, scales = reference.runtime(linear)
    return QuantizedLinear(
        codes=codes,
        scales=scales,
        perm=linear.perm,
        bias=linear.bias,
        scheme=Scheme(weights=WeightSpec(bits=8), activations=spec),
        group_size=linear.in_features // scales.shape[1],
        backend=linear.backend,
    )


def folded(linear: QuantizedLinear) -> QuantizedLinear:
    """The same codes under one level of scales, group times channel in float16, where QQQ has two.

    QQQ's kernel rounds code times group scale to an int8 weight, which costs instructions for every weight. Folded, the
    groups' integer accumulators are scaled instead: nearer to the weight that was quantized, by up to half an int8
    step per weight from what that kernel computes. Linears without such a second level come back as they are.

    Raises:
        ConfigError: a product is beyond float16.
    """
    if linear.levels != "qqq" or linear.channel_scales is None:
        return linear
    scales = linear.scales.astype(jnp.float32) * linear.channel_scales.astype(jnp.float32)[:, None]
    scales = scales.astype(jnp.float16)
    known = not isinstance(scales, jax.core.Tracer)
    if known and not bool(jnp.all(jnp.isfinite(scales))):
        raise errors.ConfigError(
            "scales of two levels cannot be folded: their product is beyond float16 (65504); load the model with "
            'dequantize="never"'
        )
    coded = dataclasses.replace(linear.scheme.weights, levels="single")
    scheme = dataclasses.replace(linear.scheme, weights=coded)
    return dataclasses.replace(linear, scales=scales, channel_scales=None, scheme=scheme)


def fuse(linears: Sequence[Linear | QuantizedLinear]) -> Linear | QuantizedLinear | None:
    """One linear whose outputs are those of `linears` in order; None where they cannot share one.

    They can if all are dense of one dtype, or all quantized with equal scheme, group size, backend,
    input permutation, and equal parts (zeros, bias, ...) of equal dtypes. Dense linears of one
    dtype need biases in all or none.
    """
    if all(isinstance(linear, Linear) for linear in linears):
        return _fuse_dense(linears)
    if not all(isinstance(linear, QuantizedLinear) for linear in linears):
        return None
    first = linears[0]
    if any(_form(linear) != _form(first) for linear in linears):
        return None
    if first.perm is not None and not all(
        np.array_equal(linear.perm, first.perm) for linear in linears
    ):
        return None
    parts = {}
    for name in ARRAYS_ALONG_N:
        if getattr(first, name) is not None:
            arrays = [getattr(linear, name) for linear in linears]
            on_host = all(isinstance(array, np.ndarray) for array in arrays)
            parts[name] = (np if on_host else jnp).concatenate(arrays)
    static = dict(scheme=first.scheme, group_size=first.group_size, backend=first.backend)
    return QuantizedLinear(**parts, **static, perm=first.perm)


def _form(linear: QuantizedLinear) -> tuple:
    """What must be equal for two linears to be rows of one."""
    arrays = [getattr(linear, name) for name in (*ARRAYS_ALONG_N, "perm")]
    dtypes = [None if array is None else array.dtype for array in arrays]
    return (linear.in_features, linear.scheme, linear.group_size, linear.backend, *dtypes)


def _fuse_dense(linears: Sequence[Linear]) -> Linear | None:
    def form(linear: Linear):
        return linear.in_features, linear.weight[...].dtype, linear.bias is None

    if any(form(linear) != form(linears[0]) for linear in linears):
        return None
    weight = jnp.concatenate([linear.weight[...] for linear in linears])
    if linears[0].bias is None:
        return Linear(weight)
    return Linear(weight, jnp.concatenate([linear.bias[...] for linear in linears]))
