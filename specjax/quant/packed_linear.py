"""The run-time form of a quantized linear where there is a GPU that the kernels support."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from specjax.pallas import device, dispatch
from specjax.pallas.glue.parts import Parts
from specjax.pallas.matmul import backends, packed
from specjax.pallas.matmul.form import PackedWeight
from specjax.pallas.matmul.formats import registry
from specjax.quant import linear as canonical
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import ActivationSpec, Scheme


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear:
    """y = x W^T + bias with W as the kernels read it.

    Attributes:
        weight: tiled, columns permuted.
        perm: codes[:, j] belongs to input perm[j], as in `QuantizedLinear`.
        bias: floats.
        scheme: static.
        backend: static; which implementation of the op runs it.
    """

    weight: PackedWeight
    perm: Int[Array, "K"] | None = None
    bias: Float[Array, "N"] | None = None
    scheme: Scheme = dataclasses.field(metadata=dict(static=True))
    backend: dispatch.Backend = dataclasses.field(default="auto", metadata=dict(static=True))

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        """x W^T + bias in the dtype of x, with x rounded as the scheme says."""
        groups = None
        if self.weight.minima is not None:
            groups = self.in_features // self.weight.group_size
        return canonical.product(self, self.weight, groups, x)

    def parts(self, x: Float[Array, "... K"]) -> Parts | None:
        """The product before its parts are added, for kernels that add them; None where it has no such form here."""
        supported = device.unsupported() is None
        floats = x.dtype in (jnp.float16, jnp.bfloat16)
        plain = self.scheme.activations is None and self.bias is None
        rows = math.prod(x.shape[:-1])
        if not (supported and floats and plain) or rows > backends.MAX_ROWS:
            return None
        if not dispatch.permits(self.backend, self.weight.form.format.op(16), "mosaic"):
            return None
        from specjax.pallas.matmul import mosaic

        if self.perm is not None:
            x = jnp.take(x, self.perm, axis=-1)
        rows = x.reshape(rows, -1)
        table = dispatch.policy(self.backend).table(self.weight.form.format.op(16))
        arch = device.current().arch
        sums = mosaic.float_parts(rows, self.weight, arch=arch, tuned=table)
        shape = (*x.shape[:-1], self.out_features)
        return None if sums is None else Parts(sums=sums, shape=shape, dtype=x.dtype)

    def with_activations(self, spec: ActivationSpec | None) -> "PackedLinear":
        """The same arrays (not copied) under another rounding of the inputs.

        Raises:
            ConfigError: the codes cannot be multiplied by such activations.
        """
        scheme = Scheme(weights=self.scheme.weights, activations=spec)
        return dataclasses.replace(self, scheme=scheme)

    def with_backend(self, backend: dispatch.Backend) -> "PackedLinear":
        """The same arrays (not copied) run by another implementation."""
        return dataclasses.replace(self, backend=backend)


nnx.register_data_type(PackedLinear)


def operand_bits(scheme: Scheme) -> int:
    """Bits of the inputs that the kernel multiplies: 16, or 8 for all integers."""
    return 16 if scheme.activations is None else 8


def has_kernel(linear: QuantizedLinear) -> bool:
    """Whether a kernel that may run on this machine reads the packed form of a linear under its scheme."""
    spec = linear.scheme.activations
    input_bits = 16 if spec is None else spec.bits
    if packed.refuses(linear, operand_bits(linear.scheme)) is not None:
        return False
    return backends.has_kernel(registry.of(linear), input_bits, linear.backend)


def pack(linear: QuantizedLinear) -> PackedLinear | QuantizedLinear:
    """The packed form; the linear itself where it has none (`packed.refuses` says why)."""
    bits = operand_bits(linear.scheme)
    if packed.refuses(linear, bits) is not None:
        return linear
    return PackedLinear(
        weight=packed.pack(linear, bits),
        perm=linear.perm,
        bias=linear.bias,
        scheme=linear.scheme,
        backend=linear.backend,
    )
