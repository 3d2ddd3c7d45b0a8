"""Matmul of int4 inputs and 4-bit integer weights on NVIDIA GPUs, from packed weights.

Ampere and Ada multiply 4-bit integers natively. Hopper does not (mma.sync emulates it there): inputs
are widened to int8 on the way in, as they are wherever a second level makes int8 weights (QQQ).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from specjax.pallas.mosaic import matmul as shared
from specjax.pallas.mosaic.packed import PackedWeight
from specjax.pallas.mosaic.plan import Config


def matmul(
    x_codes: Shaped[Array, "M K"],
    x_scale: Float[Array, "M 1"],
    weight: PackedWeight,
    *,
    arch: tuple[int, int],
    x_sums: Float[Array, "M G"] | None = None,
    bias: Float[Array, "N"] | None = None,
    out_dtype=jnp.float32,
    config: Config | None = None,
    interpret=None,
) -> Float[Array, "M N"]:
    """(x_codes * x_scale) W^T + bias in `out_dtype`; see `mosaic.matmul.integer_matmul`."""
    epilogue = dict(x_sums=x_sums, bias=bias, out_dtype=out_dtype)
    launch = dict(name="matmul_w4a4", arch=arch, config=config, interpret=interpret)
    return shared.integer_matmul(x_codes, x_scale, weight, **launch, **epilogue)
