"""The Triton kernel; imported only where jax-triton runs it."""

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
    CODES: tl.constexpr,
    CODE: tl.constexpr,
    COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Sums of one part of the inputs for 64 outputs and BLOCK_M rows, in float32.

    Words hold CODES codes of a row: number i of them is CODE(words, i), in column COLUMN(place of the word, i)
    of its tile; the format states both. GROUP 0: scales are applied by the caller.
    """
    block, split, rows_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_n, half = block // 2, block % 2
    rows = rows_block * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs, words = tl.arange(0, 64), tl.arange(0, 128 // CODES)
    total = tl.zeros((BLOCK_M, 64), dtype=tl.float32)
    for tile in range(split * K_TILES // SPLITS, (split + 1) * K_TILES // SPLITS):
        first_row = (tile_n * K_TILES + tile) * 128 + half * 64
        word = tl.load(words_ptr + (first_row + outputs)[None, :] * (128 // CODES) + words[:, None])
        part = tl.zeros((BLOCK_M, 64), dtype=tl.float32)
        for number in tl.static_range(CODES):
            code = CODE(word, number).to(tl.float32)
            if GROUP != 0 and GROUP < 128:
                entry = (tile_n * K_TILES + tile) * (128 // GROUP) + COLUMN(
                    words, 0
                ) // 32 * 32 // GROUP
                place = entry[:, None] * 128 + half * 64 + outputs[None, :]
                code *= tl.load(scales_ptr + place).to(tl.float32)
            inputs = tile * 128 + COLUMN(words, number)
            x = tl.load(x_ptr + rows[:, None] * K + inputs[None, :])
            part += tl.dot(x, code.to(x.dtype))
        if GROUP == 128:
            place = (tile_n * K_TILES + tile) * 128 + half * 64 + outputs
            part *= tl.load(scales_ptr + place).to(tl.float32)[None, :]
        total += part
    width = N_TILES * 128
    place = (split * ROWS + rows)[:, None] * width
    tl.store(out_ptr + place + (block * 64 + outputs)[None, :], total)
