"""Packing weights for the kernels: pre-tiled, columns permuted, scale tables per tile.

`pack` makes it once from a canonical weight (`weight.QuantizedWeight`), `unpack` gives the
canonical arrays back bit for bit. Outputs and inputs are padded to whole tiles of `TILE` with codes
0 and scales 0, so that every shape runs and padding adds nothing to a sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from specjax import errors
from specjax.pallas.matmul.form import TILE, Form, PackedWeight
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.formats.base import Format
from specjax.pallas.matmul.weight import Canonical, QuantizedWeight

_GROUP_SIZES = (32, 64, 128)


def refuses(weight: QuantizedWeight, operand_bits: int) -> str | None:
    """Why `weight` has no packed form for inputs of `operand_bits`, or None."""
    format = registry.of(weight)
    reason = format.refuses_kernels()
    if reason is not None:
        return reason
    inputs, size = weight.codes.shape[1], weight.group_size
    if operand_bits == 16 and (reason := refuses_floats(format)) is not None:
        return reason
    if operand_bits == 8 and size == 32:
        return (
            "group_size=32 under integer inputs; supported: 64, multiples of 128, one per channel"
        )
    if not (size == inputs or size in _GROUP_SIZES or size % TILE == 0):
        return f"group_size={size}; supported: 32, 64, multiples of {TILE}, one per channel"
    known = not isinstance(weight.scales, jax.core.Tracer | jax.ShapeDtypeStruct)
    return format.refuses_values(weight) if known else None


def refuses_floats(format: Format) -> str | None:
    """Why the kernels do not multiply float inputs by weights of a format, or None."""
    if format.two_level:
        return f"levels={format.levels!r} has int8 second-level weights; they take integer inputs"
    return None


def refuses_unpacked(weight: QuantizedWeight) -> str:
    """Why the kernels cannot take a canonical weight."""
    reason = registry.of(weight).refuses_kernels()
    return reason or "the weight is not packed (prepare does it at load)"


def pack(weight: QuantizedWeight, operand_bits: int) -> PackedWeight:
    """The packed form of `weight` for inputs of 16 (float) or 8 bits (integer; 4-bit inputs too).

    Traceable; run it once, when a model is prepared.

    Raises:
        ConfigError: there is none, with the reason of `refuses`.
    """
    reason = refuses(weight, operand_bits)
    if reason is not None:
        raise errors.ConfigError(f"weight cannot be packed: {reason}")
    form = _form(weight, operand_bits)
    zeros = weight.zeros
    if zeros is not None:
        zeros = _tiled_table(form.format.stored_zeros(zeros, weight.scales), form)
    channel = weight.channel_scales
    if channel is not None:
        padding = form.n_tiles * TILE - form.out_features
        channel = jnp.pad(channel, (0, padding)).reshape(form.n_tiles, TILE)
    return PackedWeight(
        codes=_tiled_codes(jnp.asarray(weight.codes), form),
        scales=_tiled_table(form.format.stored_scales(weight.scales), form),
        zeros=zeros,
        minima=None if weight.minima is None else _tiled_table(weight.minima, form),
        channel_scales=channel,
        form=form,
    )


def _form(weight: QuantizedWeight, operand_bits: int) -> Form:
    outputs, inputs = weight.codes.shape
    zeros = "" if weight.zeros is None else str(weight.zeros.dtype)
    return Form(
        out_features=outputs,
        in_features=inputs,
        group_size=weight.group_size,
        format=registry.of(weight),
        operand_bits=operand_bits,
        dtypes=(str(weight.scales.dtype), zeros),
    )


def _tiled_codes(codes: Shaped[Array, "N K"], form: Form) -> Shaped[Array, "I J 128 W"]:
    codes = form.format.stored(codes)
    rows, columns = form.n_tiles * TILE, form.k_tiles * TILE
    codes = jnp.pad(codes, ((0, rows - codes.shape[0]), (0, columns - codes.shape[1])))
    codes = form.format.order(form.operand_bits).to_memory(codes)
    codes = codes.reshape(form.n_tiles, TILE, form.k_tiles, TILE).swapaxes(1, 2)
    return form.format.to_bytes(codes)


def _tiled_table(table: Shaped[Array, "N G"], form: Form) -> Shaped[Array, "I Q 128"]:
    table = jnp.pad(table, ((0, form.n_tiles * TILE - table.shape[0]), (0, 1)))
    table = table[:, form.entries()]  # entry -1 is the column of padding
    return table.reshape(form.n_tiles, TILE, -1).swapaxes(1, 2)


def unpack(packed: PackedWeight) -> Canonical:
    """The canonical arrays that `packed` was made from: the inverse of `pack`."""
    form = packed.form
    scales, zeros = (canonical_table(array, form) for array in (packed.scales, packed.zeros))
    if zeros is not None:
        zeros = form.format.restored_zeros(zeros, scales).astype(form.dtypes[1])
    channel = packed.channel_scales
    return Canonical(
        codes=form.format.restored(_stored_codes(packed)),
        scales=scales.astype(form.dtypes[0]),
        zeros=zeros,
        minima=canonical_table(packed.minima, form),
        channel_scales=None if channel is None else channel.reshape(-1)[: form.out_features],
        group_size=form.group_size,
        levels=form.format.levels,
    )


def _stored_codes(packed: PackedWeight) -> Shaped[Array, "N K"]:
    """The stored codes as int8, in the order of the canonical weight, without padding."""
    form = packed.form
    codes = form.format.from_bytes(packed.codes)
    codes = codes.swapaxes(1, 2).reshape(form.n_tiles * TILE, form.k_tiles * TILE)
    codes = form.format.order(form.operand_bits).from_memory(codes)
    return codes[: form.out_features, : form.in_features]


def canonical_table(
    table: Shaped[Array, "I Q 128"] | None, form: Form
) -> Shaped[Array, "N G"] | None:
    """A packed table by output and group, without padding; None stays None."""
    if table is None:
        return None
    # Entries of one group are equal: its first one is taken.
    _, first = np.unique(form.entries(), return_index=True)
    first = first[int(form.entries().min() < 0) :]
    return table.swapaxes(1, 2).reshape(form.n_tiles * TILE, -1)[: form.out_features, first]
