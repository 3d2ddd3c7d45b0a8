"""Adding the product of one group to a sum: the same arithmetic in every skeleton."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from specjax.pallas.mosaic.plan import Plan


def add_group(plan: Plan, total, part, table: Callable, sums: Callable):
    """total + scale * (part + zero * sums) + minimum * sums; QoQ keeps integers throughout.

    `table(name)` loads a value per output, `sums()` one per row of the inputs.
    """
    shape, dtype = part.shape, plan.sum_dtype

    def by_output(name: str, to):
        return lax.broadcast_in_dim(table(name).astype(to), shape, (0,))

    def by_row():
        return lax.broadcast_in_dim(sums(), shape, (1,))

    if dtype == jnp.int32:
        # Shifted back, for the sums of all groups would leave int32 otherwise.
        part = part >> (plan.factor.bit_length() - 1)
        return total + part * by_output("scales", dtype) + by_output("zeros", dtype) * by_row()
    if plan.uses_sums:
        shift = by_output("zeros", plan.acc_dtype) if plan.has_zeros else plan.form.half
        part = part + shift * by_row()
    total = total + part.astype(dtype) * by_output("scales", dtype)
    if plan.has_minima:
        total = total + by_output("minima", dtype) * by_row()
    return total
