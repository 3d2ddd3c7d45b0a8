"""Matmul of float inputs and 4-bit weights on NVIDIA GPUs, from packed weights."""

import functools

from specjax.pallas.matmul import mosaic as shared

# See `mosaic.matmul.float_matmul` for arguments and result.
matmul = functools.partial(shared.float_matmul, name="matmul_w4a16")
