"""Matmul of int4 inputs and 4-bit integer weights on NVIDIA GPUs, from packed weights.

Ampere and Ada multiply 4-bit integers natively. Hopper does not (mma.sync emulates it there): inputs
are widened to int8 on the way in, as they are wherever a second level makes int8 weights (QQQ).
"""

import functools

from specjax.pallas.matmul import mosaic as shared

# See `mosaic.matmul.integer_matmul` for arguments and result.
matmul = functools.partial(shared.integer_matmul, name="matmul_w4a4")
