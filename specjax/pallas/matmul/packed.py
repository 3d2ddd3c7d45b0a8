"""The run-time form of integer weights: pre-tiled, columns permuted, scale tables per tile.

`pack` makes it once from a canonical weight (`weights.QuantizedWeight`), `unpack` gives the
canonical arrays back bit for bit. Outputs and inputs are padded to whole tiles of `TILE` with codes
0 and scales 0, so that every shape runs and padding adds nothing to a sum.

Codes are stored signed: unsigned ones lose half their range (c = u - 8, or u - 128), and what that
takes away comes back through the group sums of the inputs:

    sum_k (u - z) x = sum_k c x + (half - z) sum_k x
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from specjax import errors
from specjax.pallas import weights
from specjax.pallas.matmul import columns

TILE = 128
GROUP_SIZES = (32, 64, 128)
# Tiles of inputs that one pipeline step of a kernel may have.
STEP_TILES = (4, 2, 1)
_TABLES = ("scales", "zeros", "minima")
_ARRAYS = ("codes", *_TABLES, "channel_scales")
# float16 holds every integer up to here, which the in-register second level of QQQ relies on.
_LARGEST_QQQ_SCALE = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What the arrays of a `PackedWeight` mean; static.

    Attributes:
        out_features, in_features: before padding.
        group_size: input features per entry of the canonical tables; `in_features` per channel.
        code_bits: 4 or 8.
        operand_bits: 16 (float inputs) or 8 (integer inputs); chooses the order of the columns.
        levels: "single", "qqq" or "qoq", as in `weights`.
        two_level: `scales` make an int8 weight of the codes, and `channel_scales` floats of that.
        signed: the canonical codes are.
        dtypes: of the canonical scales and zeros, by name ("" without zeros).
    """

    out_features: int
    in_features: int
    group_size: int
    code_bits: int
    operand_bits: int
    levels: str = "single"
    two_level: bool = False
    signed: bool = True
    dtypes: tuple[str, str] = ("float16", "")

    @property
    def n_tiles(self) -> int:
        return -(-self.out_features // TILE)

    @property
    def k_tiles(self) -> int:
        return -(-self.in_features // TILE)

    @property
    def split_tiles(self) -> int:
        """Tiles of inputs between two places where the sum may be split."""
        return next(tiles for tiles in STEP_TILES if self.k_tiles % tiles == 0)

    @property
    def per_channel(self) -> bool:
        """One entry of the tables per output: they are applied after the whole sum."""
        return self.group_size == self.in_features and not self.two_level

    @property
    def table_group(self) -> int:
        """Input features per entry of the packed tables; 0 per channel."""
        return 0 if self.per_channel else min(self.group_size, TILE)

    @property
    def half(self) -> int:
        """What unsigned codes lose when they are stored signed."""
        return 0 if self.signed else 1 << (self.code_bits - 1)

    def entries(self) -> np.ndarray:
        """The canonical group of each entry of the packed tables; -1 beyond the inputs."""
        if self.per_channel:
            return np.zeros(1, int)
        first = np.arange(0, self.k_tiles * TILE, self.table_group)
        return np.where(first < self.in_features, first // self.group_size, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight as the Mosaic kernels read it. I = N / TILE and J = K / TILE after padding.

    Attributes:
        codes: two 4-bit codes per byte (low nibble first), or int8.
        scales: one per output and `form.table_group` inputs (Q of them; one per channel).
        zeros: half - zero of the canonical weight; QoQ with a second level: half * scale + zero.
        minima: as in the canonical weight.
        channel_scales: of the second level, padded.
        form: static.
    """

    codes: Shaped[Array, "I J 128 W"]
    scales: Shaped[Array, "I Q 128"]
    zeros: Int[Array, "I Q 128"] | None = None
    minima: Float[Array, "I Q 128"] | None = None
    channel_scales: Float[Array, "I 128"] | None = None
    form: Form = dataclasses.field(metadata=dict(static=True))

    @property
    def out_features(self) -> int:
        return self.form.out_features

    @property
    def in_features(self) -> int:
        return self.form.in_features

    @property
    def group_size(self) -> int:
        return self.form.group_size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Canonical:
    """The arrays of a canonical weight (see `weights.QuantizedWeight`), without its scheme."""

    codes: Shaped[Array, "N K"]
    scales: Shaped[Array, "N G"]
    zeros: Shaped[Array, "N G"] | None
    minima: Float[Array, "N G"] | None
    channel_scales: Float[Array, "N"] | None
    group_size: int
    levels: str


def refuses(weight: weights.QuantizedWeight, operand_bits: int) -> str | None:
    """Why `weight` has no packed form for inputs of `operand_bits`, or None."""
    reason = refuses_codes(weight)
    if reason is not None:
        return reason
    inputs = weight.codes.shape[1]
    size, two_level = weight.group_size, weight.channel_scales is not None
    if two_level and operand_bits == 16:
        return f"levels={weight.levels!r} has int8 second-level weights; they take integer inputs"
    if operand_bits == 8 and size == 32:
        return (
            "group_size=32 under integer inputs; supported: 64, multiples of 128, one per channel"
        )
    if size == inputs or size in GROUP_SIZES or size % TILE == 0:
        return _refuses_values(weight) if two_level else None
    return f"group_size={size}; supported: 32, 64, multiples of {TILE}, one per channel"


def refuses_codes(weight: weights.QuantizedWeight) -> str | None:
    """Why no kernel multiplies the codes of `weight`, or None."""
    dtype = weight.codes.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        return f"codes are {dtype}; the kernels take integer codes"
    return None


def _refuses_values(weight: weights.QuantizedWeight) -> str | None:
    """Two-level weights whose int8 weight the kernels would not reproduce (where values are known)."""
    if isinstance(weight.scales, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    if weight.levels == "qqq":
        scales = weight.scales.astype(jnp.float32)
        if bool(jnp.any(scales.astype(jnp.float16).astype(jnp.float32) != scales)):
            return "second-level scales of qqq are not float16 values"
        if bool(jnp.any(jnp.abs(scales) > _LARGEST_QQQ_SCALE)):
            return f"second-level scales of qqq exceed {_LARGEST_QQQ_SCALE:g}: int8 would clip"
        return None
    codes = jnp.asarray(weight.codes).astype(jnp.int32)
    codes = codes.reshape(codes.shape[0], -1, weight.group_size)
    scales, zeros = weight.scales.astype(jnp.int32), weight.zeros.astype(jnp.int32)
    ends = jnp.stack([codes.min(axis=-1), codes.max(axis=-1)]) * scales + zeros
    if bool(jnp.any((ends < -128) | (ends > 127))):
        return "the int8 weights of qoq wrap around"
    return None


def pack(weight: weights.QuantizedWeight, operand_bits: int) -> PackedWeight:
    """The packed form of `weight` for inputs of 16 (float) or 8 bits (integer; 4-bit inputs too).

    Traceable; run it once, when a model is prepared.

    Raises:
        ConfigError: there is none, with the reason of `refuses`.
    """
    reason = refuses(weight, operand_bits)
    if reason is not None:
        raise errors.ConfigError(f"weight cannot be packed: {reason}")
    form = _form(weight, operand_bits)
    zeros = None if weight.zeros is None else _stored_zeros(weight, form)
    scales = weight.scales
    if form.two_level and form.levels == "qqq":
        scales = scales.astype(jnp.float16)
    channel = weight.channel_scales
    if channel is not None:
        padding = form.n_tiles * TILE - form.out_features
        channel = jnp.pad(channel, (0, padding)).reshape(form.n_tiles, TILE)
    return PackedWeight(
        codes=_tiled_codes(jnp.asarray(weight.codes), form),
        scales=_tiled_table(scales, form),
        zeros=None if zeros is None else _tiled_table(zeros, form),
        minima=None if weight.minima is None else _tiled_table(weight.minima, form),
        channel_scales=channel,
        form=form,
    )


def _form(weight: weights.QuantizedWeight, operand_bits: int) -> Form:
    outputs, inputs = weight.codes.shape
    zeros = "" if weight.zeros is None else str(weight.zeros.dtype)
    info = jnp.iinfo(weight.codes.dtype)
    return Form(
        out_features=outputs,
        in_features=inputs,
        group_size=weight.group_size,
        code_bits=info.bits,
        operand_bits=operand_bits,
        levels=weight.levels,
        two_level=weight.channel_scales is not None,
        signed=info.min < 0,
        dtypes=(str(weight.scales.dtype), zeros),
    )


def _stored_zeros(weight: weights.QuantizedWeight, form: Form) -> Int[Array, "N G"]:
    zeros = weight.zeros.astype(jnp.int16)
    if form.two_level:
        return zeros + jnp.int16(form.half) * weight.scales.astype(jnp.int16)
    return jnp.int16(form.half) - zeros


def _tiled_codes(codes: Shaped[Array, "N K"], form: Form) -> Shaped[Array, "I J 128 W"]:
    codes = codes.astype(jnp.uint8 if not form.signed else jnp.int8)
    if not form.signed:
        codes = jax.lax.bitcast_convert_type(codes - jnp.uint8(form.half), jnp.int8)
    rows, width = form.n_tiles * TILE, form.k_tiles * TILE
    codes = jnp.pad(codes, ((0, rows - codes.shape[0]), (0, width - codes.shape[1])))
    codes = columns.to_memory(codes, form.code_bits, form.operand_bits)
    codes = codes.reshape(form.n_tiles, TILE, form.k_tiles, TILE).swapaxes(1, 2)
    if form.code_bits == 8:
        return codes
    nibbles = jax.lax.bitcast_convert_type(codes, jnp.uint8) & jnp.uint8(15)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << jnp.uint8(4))


def _tiled_table(table: Shaped[Array, "N G"], form: Form) -> Shaped[Array, "I Q 128"]:
    table = jnp.pad(table, ((0, form.n_tiles * TILE - table.shape[0]), (0, 1)))
    table = table[:, form.entries()]  # entry -1 is the column of padding
    return table.reshape(form.n_tiles, TILE, -1).swapaxes(1, 2)


def unpack(packed: PackedWeight) -> Canonical:
    """The canonical arrays that `packed` was made from: the inverse of `pack`."""
    form = packed.form
    scales, zeros = (canonical_table(array, form) for array in (packed.scales, packed.zeros))
    if zeros is not None:
        if form.two_level:
            zeros = zeros - jnp.int16(form.half) * scales.astype(jnp.int16)
        else:
            zeros = jnp.int16(form.half) - zeros
        zeros = zeros.astype(form.dtypes[1])
    channel = packed.channel_scales
    return Canonical(
        codes=_codes(packed),
        scales=scales.astype(form.dtypes[0]),
        zeros=zeros,
        minima=canonical_table(packed.minima, form),
        channel_scales=None if channel is None else channel.reshape(-1)[: form.out_features],
        group_size=form.group_size,
        levels=form.levels,
    )


def signed_codes(packed: PackedWeight) -> Shaped[Array, "N K"]:
    """The stored codes c as int8, in the order of the canonical weight, without padding."""
    form, codes = packed.form, packed.codes
    if form.code_bits == 4:
        codes = jnp.stack([_nibbles(codes << jnp.uint8(4)), _nibbles(codes)], axis=-1)
        codes = codes.reshape(*packed.codes.shape[:-1], TILE)
    codes = codes.swapaxes(1, 2).reshape(form.n_tiles * TILE, form.k_tiles * TILE)
    codes = columns.from_memory(codes, form.code_bits, form.operand_bits)
    return codes[: form.out_features, : form.in_features]


def _nibbles(codes: UInt8[Array, "..."]) -> Int[Array, "..."]:
    """The upper nibble of every byte, sign-extended."""
    return jax.lax.bitcast_convert_type(codes, jnp.int8) >> jnp.int8(4)


def _codes(packed: PackedWeight) -> Shaped[Array, "N K"]:
    codes, form = signed_codes(packed), packed.form
    if not form.signed:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8) + jnp.uint8(form.half)
    kind = "int" if form.signed else "uint"
    return codes.astype(f"{kind}{form.code_bits}")


def canonical_table(
    table: Shaped[Array, "I Q 128"] | None, form: Form
) -> Shaped[Array, "N G"] | None:
    if table is None:
        return None
    # Entries of one group are equal: its first one is taken.
    _, first = np.unique(form.entries(), return_index=True)
    first = first[int(form.entries().min() < 0) :]
    return table.swapaxes(1, 2).reshape(form.n_tiles * TILE, -1)[: form.out_features, first]


def as_codes(packed: PackedWeight) -> Shaped[Array, "I J 128 128"]:
    """The codes in the dtype the kernels load: int4 (a bitcast, no copy) or int8."""
    if packed.form.code_bits == 8:
        return packed.codes
    return jax.lax.bitcast_convert_type(packed.codes, jnp.int4).reshape(*packed.codes.shape[:3], -1)
