"""What must hold for every weight format: packing, column order, and widening against the host's definition."""

import jax.numpy as jnp
import numpy as np

from specjax.pallas.matmul import packed, registers
from specjax.pallas.matmul.columns import BLOCK
from specjax.pallas.matmul.form import TILE, PackedWeight
from specjax.pallas.matmul.formats.base import Format
from specjax.pallas.matmul.formats.kernel import KernelFormat
from specjax.pallas.matmul.operand import Operand
from specjax.pallas.matmul.weight import Canonical
from tests.pallas import fragments, ptx

FLOATS = (jnp.float16, jnp.bfloat16)
ARRAYS = ("codes", "scales", "zeros", "minima", "channel_scales")


def weight_of(
    format: Format, outputs: int, inputs: int, group_size: int, minima: bool = False
) -> Canonical:
    """A random canonical weight in a format."""
    rng = np.random.default_rng(0)
    if format.integer:
        info = jnp.iinfo(format.code_dtype)
        host = rng.integers(info.min, info.max + 1, (outputs, inputs))
        codes = jnp.asarray(host.astype(np.int8 if info.min < 0 else np.uint8))
    else:
        codes = jnp.asarray(rng.normal(0, 2, (outputs, inputs)), jnp.float32)
    tables = dict.fromkeys(ARRAYS[2:]) | format.random_tables(rng, outputs, inputs // group_size)
    if minima:
        table = rng.normal(0, 0.1, tables["scales"].shape).astype(np.float16)
        tables |= dict(zeros=None, minima=table)
    tables = {name: None if a is None else jnp.asarray(a) for name, a in tables.items()}
    codes = codes.astype(format.code_dtype)
    return Canonical(codes=codes, group_size=group_size, levels=format.levels, **tables)


def numpy_of(array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32))


def check_unpack_inverts_pack(weight: Canonical, operand_bits: int) -> None:
    found = packed.unpack(packed.pack(weight, operand_bits))
    for name in ARRAYS:
        ours, theirs = getattr(found, name), getattr(weight, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype, name
            np.testing.assert_array_equal(numpy_of(ours), numpy_of(theirs), name)
    assert (found.group_size, found.levels) == (weight.group_size, weight.levels)


def check_order(format: KernelFormat, operand_bits: int) -> None:
    """It permutes the columns of a block, and is undone."""
    columns = jnp.arange(6 * BLOCK).reshape(2, 3 * BLOCK)
    order = format.order(operand_bits)
    stored = order.to_memory(columns)
    blocks = np.asarray(stored).reshape(2, 3, BLOCK)
    np.testing.assert_array_equal(np.sort(blocks, axis=-1), columns.reshape(blocks.shape))
    np.testing.assert_array_equal(order.from_memory(stored), columns)


def check_packed_arithmetic(weight: Canonical, operand_bits: int) -> None:
    """Operands and tables, put together as the kernels do, are the weight that the host's definition gives."""
    packing = packed.pack(weight, operand_bits)
    form, format = packing.form, packing.form.format
    dtype = jnp.dtype(jnp.float16 if operand_bits == 16 else jnp.int8)
    operand = Operand(dtype=dtype, unit="wgmma", arch=(9, 0), emulate=True)
    loaded = format.loaded(packing.codes).astype(jnp.int8)
    rows = loaded.swapaxes(1, 2).reshape(form.n_tiles * TILE, -1)
    unit = form.table_group or rows.shape[1]
    tables = {name: _by_column(packing, name, unit) for name in ("scales", "zeros", "minima")}
    parts = []
    for first in range(0, rows.shape[1], unit):
        scales = tables["scales"][:, first] if format.scales_in_registers else None
        scales = None if scales is None else jnp.asarray(scales)
        stored = format.order(operand.bits).from_memory(rows[:, first : first + unit])
        is_operand = format.widening(operand) is None
        parts.append(stored if is_operand else format.widened(stored, operand, scales))
    value = np.concatenate([numpy_of(part) for part in parts], axis=1)
    factor = format.factor(operand)
    assert factor & (factor - 1) == 0
    value = value / np.float32(factor)
    if format.integer_groups:
        value = value * tables["scales"] + tables["zeros"]
    elif not format.scales_in_registers:
        shift = np.float32(format.half) if tables["zeros"] is None else tables["zeros"]
        value = (value + shift) * tables["scales"]
        value = value if tables["minima"] is None else value + tables["minima"]
    value = value[: form.out_features, : form.in_features]
    wanted = format.runtime(weight)[0] if format.two_level else format.dequantize(weight)
    np.testing.assert_array_equal(value, numpy_of(wanted))


def _by_column(packing: PackedWeight, name: str, unit: int) -> np.ndarray | None:
    table = getattr(packing, name)
    if table is None:
        return None
    table = numpy_of(table).swapaxes(1, 2)
    return np.repeat(table.reshape(-1, table.shape[-1]), unit, axis=1)


def operands(format: KernelFormat) -> list[Operand]:
    """Those that the kernels may ask the format for."""
    found = []
    for arch, unit in (((9, 0), "wgmma"), ((9, 0), "mma"), ((8, 0), "mma")):
        dtypes = {format.operand_dtype(jnp.dtype(name), arch) for name in ("int8", "int4")}
        for dtype in (*(() if format.two_level else FLOATS), *dtypes):
            found.append(Operand(dtype=jnp.dtype(dtype), unit=unit, arch=arch))
    return found


def check_assembly(format: KernelFormat, operand: Operand) -> None:
    """The assembly, run in numpy over every code in every place of a word, is `widened`."""
    widening = format.widening(operand)
    if widening is None:
        assert format.bits == operand.bits
        return
    words = _words()
    codes = _codes(words, format.bits)
    for scale in (0.5, 1.5, 7.28125, 15.796875) if format.scales_in_registers else (None,):
        scales, extra = None, ()
        if scale is not None:
            scales = jnp.full(len(words), scale, jnp.float16)
            extra = (np.repeat(np.full(2, scale, np.float16).view(np.uint32), len(words)),)
        wanted = np.asarray(format.widened(jnp.asarray(codes), operand, scales))
        found = ptx.run(widening.assembly, widening.words, words, *extra)
        for i, word in enumerate(found):
            values = word.reshape(-1, 1).view(wanted.dtype)
            chosen = wanted[:, fragments.sources(format.bits, operand.bits, i)]
            np.testing.assert_array_equal(values.astype(np.float32), chosen.astype(np.float32))


def _words() -> np.ndarray:
    """All values of the lower half of a word beside pseudo-random upper halves."""
    low = np.arange(1 << 16, dtype=np.uint64)
    return (low | ((low * 40503 + 12345) % (1 << 16)) << 16).astype(np.uint32)


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """The signed codes [words, 32 / bits], least significant first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = (words[:, None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.int64)
    return (fields - (fields >> (bits - 1) << bits)).astype(np.int8)


def check_registers(format: KernelFormat, operand: Operand) -> None:
    """For all threads: words as loaded, widened, are the operand of the matrix instruction."""
    shape = (64, 128)
    widening = format.widening(operand)
    if widening is None:
        assert registers.load_layout(format.bits, operand) == registers.layout(operand)
        return
    layouts = registers.load_layout(format.bits, operand), registers.layout(operand)
    loaded_layout, wanted_layout = (layout.to_mgpu() for layout in layouts)
    order = np.asarray(format.order(operand.bits).to_memory(jnp.arange(shape[1])))
    for warp, lane in np.ndindex(4, 32):
        pieces = {}
        for index, elements in fragments.registers(loaded_layout, shape, warp, lane).items():
            rows, stored = np.divmod(elements, shape[1])
            originals = rows * shape[1] + order[stored]
            for i in range(widening.words):
                chosen = originals[fragments.sources(format.bits, operand.bits, i)]
                pieces[index[0], index[1] * widening.words + i, index[4]] = chosen
        for index, elements in fragments.registers(wanted_layout, shape, warp, lane).items():
            np.testing.assert_array_equal(pieces[registers.piece_of(index, operand.unit)], elements)
