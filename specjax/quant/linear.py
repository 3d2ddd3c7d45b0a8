"""The canonical quantized linear: codes, scales and whatever else a format stores.

Arrays are in Hugging Face orientation. Every importer produces it, every quantizer returns it,
every exporter reads it, and models hold it in place of a dense linear. What the arrays mean is a
formula per format, in `specjax.pallas.matmul.formats`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, Real, Shaped

from specjax import errors
from specjax.pallas import dispatch
from specjax.pallas.matmul import api as matmul_op
from specjax.pallas.matmul import reference
from specjax.quant import activations
from specjax.quant.scheme import ActivationSpec, Scheme, check_group_size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedLinear:
    """y = x W^T + bias for a quantized W [N, K] (N outputs, K inputs, G = K / group_size groups).

    The constructor checks shapes and dtypes against the scheme (not when a pytree is rebuilt from
    its leaves).

    Attributes:
        codes: in the scheme's `code_dtype`; 4-bit dtypes hold two codes per byte on the device. An importer may leave
            them on the host.
        scales: floats as stored; for QoQ with `channel_scales` the integer second-level scales
            (int8).
        zeros: integers; subtracted from codes (`levels` "single"), or added to codes * scales (QoQ
            with `channel_scales`, int8 with the sign of the file).
        minima: floats added to codes * scales: GGUF Q4_1 minima; QoQ per channel: -s1_szeros.
        channel_scales: floats over the int8 weight of a two-level scheme.
        perm: codes[:, j] belongs to input perm[j] (act-order without static groups), so that groups
            are contiguous.
        bias: floats.
        scheme: static.
        group_size: static; K for one scale per output.
        backend: static; which implementation of the op runs it.
    """

    codes: Shaped[Array | np.ndarray, "N K"]
    scales: Real[Array, "N G"]
    zeros: Integer[Array, "N G"] | None = None
    minima: Float[Array, "N G"] | None = None
    channel_scales: Float[Array, "N"] | None = None
    perm: Int[Array, "K"] | None = None
    bias: Float[Array, "N"] | None = None
    scheme: Scheme = dataclasses.field(metadata=dict(static=True))
    group_size: int = dataclasses.field(metadata=dict(static=True))
    backend: dispatch.Backend = dataclasses.field(default="auto", metadata=dict(static=True))

    def __post_init__(self):
        _check_shapes(self)
        _check_parts(self)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def levels(self) -> str:
        return self.scheme.weights.levels

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        """x W^T + bias in the dtype of x, with x rounded as the scheme says."""
        groups = None if self.minima is None else self.minima.shape[1]
        return product(self, self, groups, x)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "N K"]:
        """The weight in floats, rounded once to `dtype`; inputs in their original order."""
        dense = reference.dequantize(self, dtype)
        return dense if self.perm is None else jnp.take(dense, jnp.argsort(self.perm), axis=1)

    def with_activations(self, spec: ActivationSpec | None) -> "QuantizedLinear":
        """The same arrays (not copied) under another rounding of the inputs.

        Raises:
            ConfigError: the codes cannot be multiplied by such activations.
        """
        return _with_static(self, scheme=Scheme(weights=self.scheme.weights, activations=spec))

    def with_backend(self, backend: dispatch.Backend) -> "QuantizedLinear":
        """The same arrays (not copied) run by another implementation."""
        return _with_static(self, backend=backend)

    def checked(self, name: str) -> "QuantizedLinear":
        """This linear, after reading its scales and zeros for values that would poison the model.

        Raises:
            CheckpointError: `name` has scales that are not finite, or a permutation that is none.
        """
        for field in ("scales", "minima", "channel_scales", "bias"):
            values = getattr(self, field)
            if values is not None and not bool(jnp.all(jnp.isfinite(values.astype(jnp.float32)))):
                count = int(jnp.sum(~jnp.isfinite(values.astype(jnp.float32))))
                raise errors.CheckpointError(
                    f"{name}: {count} of {values.size} {field} are NaN or infinite; the file is "
                    "damaged or its quantization failed: convert it again"
                )
        if self.perm is not None:
            order = jnp.arange(self.in_features, dtype=self.perm.dtype)
            if not bool(jnp.array_equal(jnp.sort(self.perm), order)):
                raise errors.CheckpointError(
                    f"{name}: perm is not a permutation of the {self.in_features} input features"
                )
        return self


def product(linear, weight, groups: int | None, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
    """x W^T + bias in the dtype of x, for a `linear` whose codes are `weight`, in whatever form the ops take.

    Args:
        linear: has scheme, perm, bias and backend.
        groups: of the weight's minima; None where it has none.
    """
    spec = linear.scheme.activations
    if linear.perm is not None:
        x = jnp.take(x, linear.perm, axis=-1)
    if spec is None:
        return matmul_op.matmul(x, weight, bias=linear.bias, backend=linear.backend)
    rows = activations.quantize(x, spec, groups)
    return matmul_op.matmul(
        rows.codes,
        weight,
        x_scale=rows.scale,
        x_sums=rows.sums,
        bias=linear.bias,
        out_dtype=x.dtype,
        backend=linear.backend,
    )


_STATIC = ("scheme", "group_size", "backend")
_ARRAYS = tuple(
    field.name for field in dataclasses.fields(QuantizedLinear) if field.name not in _STATIC
)


def _flatten(linear: QuantizedLinear):
    return [getattr(linear, name) for name in _ARRAYS], tuple(
        getattr(linear, name) for name in _STATIC
    )


def _flatten_with_keys(linear: QuantizedLinear):
    leaves, static = _flatten(linear)
    keys = [jax.tree_util.GetAttrKey(name) for name in _ARRAYS]
    return list(zip(keys, leaves, strict=True)), static


def _unflatten(static, leaves) -> QuantizedLinear:
    # Transformations rebuild pytrees with placeholders for leaves, which the constructor refuses.
    linear = object.__new__(QuantizedLinear)
    for name, value in zip(_ARRAYS + _STATIC, (*leaves, *static), strict=True):
        object.__setattr__(linear, name, value)
    return linear


def _with_static(linear: QuantizedLinear, **changes) -> QuantizedLinear:
    leaves, static = _flatten(linear)
    static = dict(zip(_STATIC, static, strict=True)) | changes
    return _unflatten(tuple(static.values()), leaves)


jax.tree_util.register_pytree_with_keys(QuantizedLinear, _flatten_with_keys, _unflatten, _flatten)
nnx.register_data_type(QuantizedLinear)


def _check_shapes(linear: QuantizedLinear) -> None:
    if linear.codes.ndim != 2:
        raise errors.ConfigError(f"codes must be [N, K], found shape {linear.codes.shape}")
    outputs, inputs = linear.codes.shape
    if linear.group_size == -1:
        raise errors.ConfigError(f"group_size=-1 is written as in_features={inputs} here")
    check_group_size(inputs, linear.group_size)
    table = (outputs, inputs // linear.group_size)
    expected = dict(scales=table, zeros=table, minima=table, channel_scales=(outputs,))
    for field, shape in (expected | dict(perm=(inputs,), bias=(outputs,))).items():
        value = getattr(linear, field)
        if value is not None and value.shape != shape:
            raise errors.ConfigError(
                f"{field} has shape {value.shape}, expected {shape} for codes {linear.codes.shape} "
                f"and group_size={linear.group_size}"
            )


def _check_parts(linear: QuantizedLinear) -> None:
    spec, name = linear.scheme.weights, linear.scheme.name
    if linear.codes.dtype != spec.code_dtype:
        raise errors.ConfigError(
            f"codes of scheme {name} are {spec.code_dtype}, found {linear.codes.dtype}"
        )
    offsets = [field for field in ("zeros", "minima") if getattr(linear, field) is not None]
    if len(offsets) != (0 if spec.symmetric else 1):
        wanted = "neither" if spec.symmetric else "exactly one"
        raise errors.ConfigError(
            f"scheme {name} takes {wanted} of zeros and minima, "
            f"found {', '.join(offsets) or 'none'}"
        )
    two_level = linear.channel_scales is not None
    if two_level and (not spec.two_level or offsets == ["minima"]):
        raise errors.ConfigError(
            f"scheme {name} with {', '.join(offsets) or 'no zeros'} takes no channel_scales; "
            "only qqq, and qoq with zeros, have a second level"
        )
    if not two_level and spec.two_level and linear.scales.shape[1] > 1:
        raise errors.ConfigError(
            f"scheme {name} with group_size={linear.group_size} needs channel_scales (second level)"
        )
