"""Bit layouts of the Marlin, QQQ and QServe tensor-core tiles, to plain code matrices and back.

All three cut the weight [N, K] into tiles and order the nibbles of a tile as one warp reads them:

- Marlin (W4A16) and QQQ (W4A8): tiles of 16 inputs x 64 outputs, 128 words each. Word `4 t + w` of a tile belongs to
  lane t and to the outputs 16 w .. 16 w + 15; lane t holds column c = t // 4 and c + 8 of them. Which inputs of those
  two columns the eight nibbles hold is the difference between Marlin and the two QQQ variants.
- QServe (W4A8): tiles of 32 outputs x 32 inputs, 512 bytes each; the low nibble holds output n, the high one n + 16.

Codes are uint8 [N, K] with the raw nibble 0..15. Words are int32 [K/16, 2N]; bytes are int8 [N, K/2].
"""

import numpy as np
from jaxtyping import Int, Shaped, UInt8

TILE_K, TILE_N = 16, 64
QSERVE_TILE = 32

SCALE_ORDER_GROUPED = np.arange(64).reshape(8, 8).T.reshape(-1)
"""Column j of a stored block of 64 group scales is the true column SCALE_ORDER_GROUPED[j]."""
SCALE_ORDER_CHANNEL = (2 * np.arange(4)[:, None] + np.array([0, 1, 8, 9, 16, 17, 24, 25])).reshape(
    -1
)
"""The same for blocks of 32 per-channel scales."""

_LOW_NIBBLES = np.uint32(0x0F0F0F0F)


def unpack_marlin(words: Int[np.ndarray, "K16 N2"]) -> UInt8[np.ndarray, "N K"]:
    """Codes of Marlin W4A16 words (IST-DASLab marlin, also SpecMQuant's W4A16 conversions)."""
    lanes, blocks_k, blocks_n = _lanes_first(words)
    pairs = np.empty((blocks_n, 4, 2, 8, blocks_k, 2, 4), np.uint16)
    for half_k in range(2):
        for half_n in range(2):
            pairs[:, :, half_n, :, :, half_k] = _take_pair(lanes, half_k + 2 * half_n)
    return pairs.reshape(blocks_n * TILE_N, blocks_k * 8).view(np.uint8)


def unpack_qqq(words: Int[np.ndarray, "K16 N2"], grouped: bool) -> UInt8[np.ndarray, "N K"]:
    """Codes of QQQ W4A8 words; `grouped` selects the nibble order of the group-128 kernel (HandH1998/QQQ)."""
    lanes, blocks_k, blocks_n = _lanes_first(words)
    if grouped:
        pairs = np.empty((blocks_n, 4, 2, 8, blocks_k, 4, 2), np.uint16)
        for half_n in range(2):
            for pair in range(2):
                pairs[:, :, half_n, ..., pair] = _take_pair(lanes, pair + 2 * half_n)
        return pairs.reshape(blocks_n * TILE_N, blocks_k * 8).view(np.uint8)
    quads = np.empty((blocks_n, 4, 2, 8, blocks_k, 4), np.uint32)
    quads[:, :, 0] = (lanes >> np.uint32(4)) & _LOW_NIBBLES
    quads[:, :, 1] = lanes & _LOW_NIBBLES
    return quads.reshape(blocks_n * TILE_N, blocks_k * 4).view(np.uint8)


def pack_qqq(codes: UInt8[np.ndarray, "N K"], grouped: bool) -> Int[np.ndarray, "K16 N2"]:
    """Inverse of `unpack_qqq`."""
    rows, columns = codes.shape
    shape = (rows // TILE_N, 4, 2, 8, columns // TILE_K, 4)
    if grouped:
        pairs = np.ascontiguousarray(codes).view(np.uint16).reshape(*shape, 2)
        lanes = sum(
            _place_pair(pairs[:, :, half_n, ..., pair], pair + 2 * half_n)
            for half_n in range(2)
            for pair in range(2)
        )
    else:
        quads = np.ascontiguousarray(codes).view(np.uint32).reshape(shape)
        lanes = quads[:, :, 1] | quads[:, :, 0] << np.uint32(4)
    words = lanes.transpose(3, 0, 2, 4, 1)
    return words.reshape(columns // TILE_K, 2 * rows).view(np.int32)


def unpack_qserve(packed: Shaped[np.ndarray, "N K2"]) -> UInt8[np.ndarray, "N K"]:
    """Codes of QServe W4A8 bytes (mit-han-lab/omniserve)."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    quads = np.ascontiguousarray(packed).view(np.uint32)
    quads = quads.reshape(rows // QSERVE_TILE, columns // QSERVE_TILE, 8, 4, 2, 2)
    quads = quads.transpose(0, 5, 2, 1, 4, 3)
    codes = np.empty((rows // QSERVE_TILE, 2, 2, 8, columns // QSERVE_TILE, 2, 4), np.uint32)
    codes[:, 0] = quads & _LOW_NIBBLES
    codes[:, 1] = (quads >> np.uint32(4)) & _LOW_NIBBLES
    return codes.reshape(rows, columns // 4).view(np.uint8)


def pack_qserve(codes: UInt8[np.ndarray, "N K"]) -> Int[np.ndarray, "N K2"]:
    """Inverse of `unpack_qserve`."""
    rows, columns = codes.shape
    quads = np.ascontiguousarray(codes).view(np.uint32)
    quads = quads.reshape(rows // QSERVE_TILE, 2, 2, 8, columns // QSERVE_TILE, 2, 4)
    packed = quads[:, 0] | quads[:, 1] << np.uint32(4)
    packed = np.ascontiguousarray(packed.transpose(0, 3, 2, 5, 4, 1))
    return packed.reshape(rows, columns // 8).view(np.int8)


def restore_columns(
    stored: Shaped[np.ndarray, "R N"], order: Int[np.ndarray, "P"]
) -> Shaped[np.ndarray, "R N"]:
    """Undoes a column permutation that is local to blocks of P columns: stored[:, j] is true[:, order[j]]."""
    blocks = stored.reshape(stored.shape[0], -1, order.size)
    return blocks[:, :, np.argsort(order)].reshape(stored.shape)


def permute_columns(
    true: Shaped[np.ndarray, "R N"], order: Int[np.ndarray, "P"]
) -> Shaped[np.ndarray, "R N"]:
    """Inverse of `restore_columns`."""
    return true.reshape(true.shape[0], -1, order.size)[:, :, order].reshape(true.shape)


def _lanes_first(words: Int[np.ndarray, "K16 N2"]):
    """Words as uint32 [N/64, slab 4, column 8, K/16, lane-in-column 4], so that inputs come last."""
    blocks_k, blocks_n = words.shape[0], words.shape[1] // (2 * TILE_N)
    tiles = np.ascontiguousarray(words).view(np.uint32).reshape(blocks_k, blocks_n, 8, 4, 4)
    return np.ascontiguousarray(tiles.transpose(1, 4, 2, 0, 3)), blocks_k, blocks_n


def _take_pair(words: np.ndarray, nibble: int) -> np.ndarray:
    """Nibbles `nibble` and `nibble + 4` of each word, as the low and high byte of a uint16."""
    pair = (words >> np.uint32(4 * nibble)) & np.uint32(0x000F000F)
    return (pair | pair >> np.uint32(8)).astype(np.uint16)


def _place_pair(pairs: np.ndarray, nibble: int) -> np.ndarray:
    """Inverse of `_take_pair`: words that are zero elsewhere."""
    wide = pairs.astype(np.uint32)
    return ((wide | wide << np.uint32(8)) & np.uint32(0x000F000F)) << np.uint32(4 * nibble)
