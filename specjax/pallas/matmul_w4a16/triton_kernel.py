"""The Triton kernel of `matmul_w4a16`; imported only where jax-triton runs it."""

import triton
import triton.language as tl

# Outputs of a block, and inputs of a packed tile.
BLOCK_N, TILE = 64, 128


@triton.jit
def matmul(
    x_ptr,
    words_ptr,
    scales_ptr,
    out_ptr,
    K: tl.constexpr,
    K_TILES: tl.constexpr,
    N_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums of one part of the inputs for 64 outputs and BLOCK_M rows, in float32.

    Words hold eight codes of a row in the order (4 bits, 16 bits) of `layouts`: nibble 4h + i of
    word 4b + q is column 32b + 8i + 2q + h. GROUP 0: scales are applied by the caller.
    """
    block, split, rows_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_n, half = block // 2, block % 2
    rows = rows_block * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs, words = tl.arange(0, 64), tl.arange(0, 16)
    column = 32 * (words // 4) + 2 * (words % 4)
    total = tl.zeros((BLOCK_M, 64), dtype=tl.float32)
    for tile in range(split * K_TILES // SPLITS, (split + 1) * K_TILES // SPLITS):
        first_row = (tile_n * K_TILES + tile) * 128 + half * 64
        word = tl.load(words_ptr + (first_row + outputs)[None, :] * 16 + words[:, None])
        part = tl.zeros((BLOCK_M, 64), dtype=tl.float32)
        for nibble in tl.static_range(8):
            code = ((((word >> (4 * nibble)) & 15) ^ 8) - 8).to(tl.float32)
            if GROUP != 0 and GROUP < 128:
                entry = (tile_n * K_TILES + tile) * (128 // GROUP) + 32 * (words // 4) // GROUP
                place = entry[:, None] * 128 + half * 64 + outputs[None, :]
                code *= tl.load(scales_ptr + place).to(tl.float32)
            inputs = tile * 128 + column + 8 * (nibble % 4) + nibble // 4
            x = tl.load(x_ptr + rows[:, None] * K + inputs[None, :])
            part += tl.dot(x, code.to(x.dtype))
        if GROUP == 128:
            place = (tile_n * K_TILES + tile) * 128 + half * 64 + outputs
            part *= tl.load(scales_ptr + place).to(tl.float32)[None, :]
        total += part
    width = N_TILES * 128
    place = (split * ROWS + rows)[:, None] * width
    tl.store(out_ptr + place + (block * 64 + outputs)[None, :], total)
