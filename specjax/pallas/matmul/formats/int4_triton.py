"""int4 in Triton: a code of a word and its column, in the order for 16-bit operands (see `int4`)."""

import triton


@triton.jit
def code(word, number):
    """Nibble `number` of words, sign-extended."""
    return (((word >> (4 * number)) & 15) ^ 8) - 8


@triton.jit
def column(place, number):
    """Column of nibble 4h + i of word 4b + q: 32b + 8i + 2q + h."""
    return 32 * (place // 4) + 2 * (place % 4) + 8 * (number % 4) + number // 4
