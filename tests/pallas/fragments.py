"""Who holds which element: a numpy model of Mosaic's register layouts."""

import math

import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import Replicated


def sources(code_bits: int, operand_bits: int, word: int) -> list[int]:
    """Which codes of a loaded word, least significant first, result word `word` of it holds."""
    if code_bits == 8:
        return [2 * word, 2 * word + 1]
    if operand_bits == 16:
        return [word, word + 4]
    return [word, word + 2, word + 4, word + 6]


def registers(layout, shape: tuple[int, int], warp: int, lane: int) -> dict[tuple, np.ndarray]:
    """The flat indices of the elements in each register of one thread."""
    array = np.arange(math.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        array = _tiled(array, tile)
    chosen = _places(layout.warp_dims, warp, array) | _places(layout.lane_dims, lane, array)
    vector = layout.vector_dim % array.ndim
    found = {}
    for index in np.ndindex(*layout.registers_shape(shape)):
        place = [chosen.get(axis, index[axis]) for axis in range(array.ndim)]
        place[vector] = slice(None)
        found[index] = array[tuple(place)]
    return found


def _tiled(array: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    kept = array.ndim - len(tile)
    split = [
        extent
        for size, t in zip(array.shape[kept:], tile, strict=True)
        for extent in (size // t, t)
    ]
    array = array.reshape(*array.shape[:kept], *split)
    outer = [kept + 2 * i for i in range(len(tile))]
    return array.transpose(*range(kept), *outer, *(axis + 1 for axis in outer))


def _places(dims, index: int, array: np.ndarray) -> dict[int, int]:
    """Where a warp or lane stands along the axes that it is spread over."""
    places = {}
    for dim in reversed(dims):
        size = dim.times if isinstance(dim, Replicated) else array.shape[dim]
        if not isinstance(dim, Replicated):
            places[dim % array.ndim] = index % size
        index //= size
    return places
