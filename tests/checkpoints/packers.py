"""Packers of the quantized formats, written element by element from their descriptions.

They share no code with specjax and are slow: every code is placed on its own. Codes are numpy [N, K] of raw nibbles or
bytes; `rows` of a word count from its least significant bits.
"""

import numpy as np


def into_words(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """32 / bits codes per int32 along `axis`, the first in the lowest bits."""
    per_word = 32 // bits
    codes = np.moveaxis(codes, axis, 0)
    words = np.zeros((codes.shape[0] // per_word, *codes.shape[1:]), np.uint32)
    for index in range(codes.shape[0]):
        shift = np.uint32(bits * (index % per_word))
        words[index // per_word] |= codes[index].astype(np.uint32) << shift
    return np.moveaxis(words, 0, axis).view(np.int32)


def gptq(codes, zeros, scales, g_idx, *, bits: int, version: int) -> dict[str, np.ndarray]:
    """Codes [N, K] and zeros [N, G] unsigned, scales [N, G]; version 1 subtracts one per zero, with borrows."""
    qzeros = into_words(zeros.T, bits, axis=1).view(np.uint32)
    if version == 1:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = ((qzeros.astype(np.uint64) - ones) % 2**32).astype(np.uint32)
    return {
        "qweight": into_words(codes.T, bits, axis=0),
        "qzeros": qzeros.view(np.int32),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": np.asarray(g_idx, np.int32),
    }


AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output j of eight is found in nibble AWQ_POSITIONS[j]."""


def awq_words(codes_in_out: np.ndarray) -> np.ndarray:
    """[R, N] to int32 [R, N / 8]."""
    rows, outputs = codes_in_out.shape
    words = np.zeros((rows, outputs // 8), np.uint32)
    for n in range(outputs):
        shift = np.uint32(4 * AWQ_POSITIONS[n % 8])
        words[:, n // 8] |= codes_in_out[:, n].astype(np.uint32) << shift
    return words.view(np.int32)


def _tile_words(codes: np.ndarray, offsets) -> np.ndarray:
    """16 x 64 tiles; `offsets(t)` lists the (k, n) of lane t's eight nibbles, lowest first, within 16 x 16."""
    outputs, inputs = codes.shape
    words = np.zeros((inputs // 16) * (outputs // 64) * 128, np.uint32)
    for kt in range(inputs // 16):
        for nt in range(outputs // 64):
            for t in range(32):
                for w in range(4):
                    word = 0
                    for j, (k, n) in enumerate(offsets(t)):
                        word |= int(codes[64 * nt + 16 * w + n, 16 * kt + k]) << (4 * j)
                    words[(kt * (outputs // 64) + nt) * 128 + 4 * t + w] = word
    return words.view(np.int32).reshape(inputs // 16, 2 * outputs)


def marlin(codes: np.ndarray) -> np.ndarray:
    def offsets(t):
        c, r = t // 4, 2 * (t % 4)
        first = [(r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8)]
        return first + [(k + 1, n) for k, n in first]

    return _tile_words(codes, offsets)


def qqq(codes: np.ndarray, grouped: bool) -> np.ndarray:
    order = [0, 2, 4, 6, 1, 3, 5, 7] if grouped else [4, 0, 5, 1, 6, 2, 7, 3]

    def offsets(t):
        c, k = t // 4, 4 * (t % 4)
        values = [(k + i, c) for i in range(4)] + [(k + i, c + 8) for i in range(4)]
        return [values[i] for i in order]

    return _tile_words(codes, offsets)


def grouped_scales(scales_in_out: np.ndarray) -> np.ndarray:
    """Marlin and QQQ group scales [G, N]: in blocks of 64, new[8 i + j] = old[i + 8 j]."""
    out = np.empty_like(scales_in_out)
    for n in range(scales_in_out.shape[1]):
        block, i, j = n // 64, (n % 64) // 8, n % 8
        out[:, n] = scales_in_out[:, 64 * block + i + 8 * j]
    return out


def channel_scales(scales_in_out: np.ndarray) -> np.ndarray:
    """Per-channel scales [1, N]: in blocks of 32, eight from each of 2 i + {0, 1, 8, 9, 16, 17, 24, 25}."""
    out = np.empty_like(scales_in_out)
    for n in range(scales_in_out.shape[1]):
        block, i, j = n // 32, (n % 32) // 8, n % 8
        out[:, n] = scales_in_out[:, 32 * block + 2 * i + (0, 1, 8, 9, 16, 17, 24, 25)[j]]
    return out


def qserve(codes: np.ndarray) -> np.ndarray:
    """int8 [N, K / 2] in 32 x 32 tiles of 512 bytes."""
    outputs, inputs = codes.shape
    flat = np.zeros(outputs * inputs // 2, np.uint8)
    for n in range(outputs):
        for k in range(inputs):
            tile = (n // 32) * (inputs // 32) + k // 32
            high, n8, nl = (n % 32) // 16, (n % 16) // 8, n % 8
            k16, kl, kr = (k % 32) // 16, (k % 16) // 4, k % 4
            byte = (((nl * 4 + kl) * 2 + k16) * 2 + n8) * 4 + kr
            flat[512 * tile + byte] |= int(codes[n, k]) << (4 * high)
    return flat.view(np.int8).reshape(outputs, inputs // 2)


S2_OMNISERVE = [n for start in range(8) for n in range(start, 32, 8)]
S2_DEEPCOMPRESSOR = [n for half in (0, 16) for i in range(8) for n in (half + i, half + 8 + i)]


def s2_columns(table_in_out: np.ndarray, order: list[int]) -> np.ndarray:
    """Second-level scales or zeros [G, N]: stored column j of a block of 32 is true column order[j]."""
    out = np.empty_like(table_in_out)
    for n in range(table_in_out.shape[1]):
        out[:, n] = table_in_out[:, n // 32 * 32 + order[n % 32]]
    return out
