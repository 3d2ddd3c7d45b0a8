"""The assembly that widens codes in registers, run in numpy over every code in every place."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.operand import Operand
from tests.pallas import ptx
from tests.pallas.fragments import sources

ARCHS = ((9, 0), (8, 0))
FLOATS = {jnp.float16: np.float16, jnp.bfloat16: ml_dtypes.bfloat16}


def words() -> np.ndarray:
    """All values of the lower half of a word beside pseudo-random upper halves."""
    low = np.arange(1 << 16, dtype=np.uint64)
    return (low | ((low * 40503 + 12345) % (1 << 16)) << 16).astype(np.uint32)


def codes(word: np.ndarray, bits: int) -> np.ndarray:
    """The signed codes [words, 32 / bits], least significant first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = (word[:, None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.int64)
    return fields - (fields >> (bits - 1) << bits)


def widening(code_dtype: str, dtype, arch, levels: str = "single"):
    operand = Operand(dtype=jnp.dtype(dtype), unit="wgmma", arch=arch)
    return registry.find(code_dtype, levels).widening(operand)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_floats(bits, dtype, arch):
    asm, count = widening(f"int{bits}", dtype, arch)
    out, stored = ptx.run(asm, count, words()), codes(words(), bits)
    for i, pair in enumerate(out):
        values = pair.reshape(-1, 1).view(FLOATS[dtype]).astype(np.float64)
        np.testing.assert_array_equal(values, stored[:, sources(bits, 16, i)])


def test_int8_of_nibbles():
    asm, count = widening("int4", jnp.int8, (9, 0))
    stored = codes(words(), 4)
    for i, quad in enumerate(ptx.run(asm, count, words())):
        values = quad.reshape(-1, 1).view(np.int8)
        np.testing.assert_array_equal(values, 16 * stored[:, sources(4, 8, i)])


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 3.0, 7.28125, 12.34375, 15.796875, 15.875, 16.0])
def test_second_level_rounds_half_to_even(scale):
    asm, count = widening("int4", jnp.int8, (9, 0), "qqq")
    pair = np.full(2, scale, np.float16).view(np.uint32)
    stored = codes(words(), 4)
    wanted = np.rint(stored * np.float64(np.float16(scale)))
    valid = np.abs(wanted).max(axis=1) < 128  # 8 * 16 is not an int8; `pack` admits no more
    for i, quad in enumerate(ptx.run(asm, count, words(), np.repeat(pair, len(words())))):
        values = quad.reshape(-1, 1).view(np.int8)
        np.testing.assert_array_equal(values[valid], wanted[valid][:, sources(4, 8, i)])


def test_sm80_has_no_bfloat16_subtraction():
    for bits in (4, 8):
        asm, _ = widening(f"int{bits}", jnp.bfloat16, (8, 0))
        assert "sub.bf16x2" not in asm
