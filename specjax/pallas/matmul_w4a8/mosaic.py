"""Matmul of int8 inputs and 4-bit integer weights on NVIDIA GPUs, from packed weights."""

import functools

from specjax.pallas.matmul import mosaic as shared

# See `mosaic.matmul.integer_matmul` for arguments and result.
matmul = functools.partial(shared.integer_matmul, name="matmul_w4a8")
