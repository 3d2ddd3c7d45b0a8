"""Adding the product of one group to a sum: the same arithmetic in every skeleton."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from specjax.pallas.matmul.plan import Plan


def add_group(plan: Plan, total, part, table: Callable, sums: Callable):
    """total + scale * (part + zero * sums) + minimum * sums; in integers throughout where those of groups are.

    Accumulators exceed sums of codes by `plan.factor`, as do `sums` unless each group is shifted back.

    `table(name)` loads a value per output, `sums()` one per row of the inputs.
    """
    shape, dtype = part.shape, plan.sum_dtype

    def by_output(name: str, to):
        return lax.broadcast_in_dim(table(name).astype(to), shape, (0,))

    def by_row():
        return lax.broadcast_in_dim(sums(), shape, (1,))

    if dtype == jnp.int32:
        if not plan.shifts_late:
            part = part >> _shift(plan)
        return total + part * by_output("scales", dtype) + by_output("zeros", dtype) * by_row()
    if plan.uses_sums:
        shift = by_output("zeros", plan.acc_dtype) if plan.has_zeros else plan.format.half
        part = part + shift * by_row()
    total = total + part.astype(dtype) * by_output("scales", dtype)
    if plan.has_minima:
        total = total + by_output("minima", dtype) * by_row()
    return total


def finish(plan: Plan, total):
    """The sum of all groups, ready to be stored."""
    total = total >> _shift(plan) if plan.shifts_late else total
    return total.astype(plan.out_dtype)


def _shift(plan: Plan) -> int:
    return plan.factor.bit_length() - 1
