"""Hadamard matrices of the orders that Llama shapes need, constructed rather than tabulated.

Orders 2^k come from Sylvester's doubling, q + 1 and 2 (q + 1) from Paley's two constructions over
the fields with p or p^2 elements, 156 and 172 from four circulants in the Goethals-Seidel array,
and all others as a product of one of these and a Sylvester matrix: 576 = 36 x 16, 1536 = 12 x 128,
14336 = 28 x 512.
"""

import functools
import math

import numpy as np


def sylvester(order: int) -> np.ndarray:
    """The Hadamard matrix of order 2^k (entries +-1, int8, symmetric)."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@functools.cache
def factors(order: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Two +-1 matrices whose Kronecker product (left x right) is a Hadamard matrix of this order.

    The right one is a Sylvester matrix. For powers of two the factors are balanced, which makes the
    product cheap to apply. None where no construction known here gives the order (odd orders among
    them).
    """
    if order < 1:
        return None
    twos = (order & -order).bit_length() - 1
    odd = order >> twos
    if odd == 1:
        return sylvester(2 ** (twos // 2)), sylvester(2 ** (twos - twos // 2))
    for exponent in range(2, twos + 1):
        left = _direct(odd << exponent)
        if left is not None:
            return left, sylvester(2 ** (twos - exponent))
    return None


def hadamard(order: int) -> np.ndarray | None:
    """A Hadamard matrix of this order (int8 entries +-1; H H^T = order I), or None where none is
    known here.
    """
    found = factors(order)
    return None if found is None else np.kron(*found)


def random_orthogonal(order: int, generator: np.random.Generator) -> np.ndarray:
    """A Haar-distributed orthogonal matrix (float64)."""
    q, r = np.linalg.qr(generator.standard_normal((order, order)))
    return q * np.sign(np.diagonal(r))


def orthogonal_factors(order: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal (left, right) in float64 with left x right of this order.

    Hadamard where one is known. Otherwise the odd part of the order gets a random orthogonal
    matrix, which has to be stored, and the rest a Sylvester matrix: 9 heads become (9 random) x 1.
    """
    found = factors(order)
    if found is None:
        power = order & -order
        return random_orthogonal(order // power, generator), sylvester(power) / math.sqrt(power)
    return tuple(matrix / math.sqrt(len(matrix)) for matrix in found)


def _direct(order: int) -> np.ndarray | None:
    """Paley or Goethals-Seidel; None where neither applies."""
    if order % 4:
        return None
    field = _prime_power(order - 1)
    if field is not None:
        return _paley_first(*field)
    field = _prime_power(order // 2 - 1)
    if field is not None and (order // 2 - 1) % 4 == 1:
        return _paley_second(*field)
    return _goethals_seidel(order // 4) if order // 4 in _CIRCULANT_MULTIPLIERS else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, degree) with q = p^degree, p an odd prime, degree 1 or 2."""
    for degree in (1, 2):
        p = round(q ** (1 / degree))
        if p**degree == q and p > 2 and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, degree
    return None


def _jacobsthal(p: int, degree: int) -> np.ndarray:
    """chi(x - y) over the field: +1 for squares, -1 for other non-zero differences, 0 on the
    diagonal.

    In GF(p^2) = GF(p)(sqrt r), an element is a square iff its norm a^2 - r b^2 is one in GF(p).
    """
    legendre = np.full(p, -1, np.int8)
    legendre[np.arange(1, p) ** 2 % p] = 1
    legendre[0] = 0
    index = np.arange(p)
    difference = (index[:, None] - index) % p
    if degree == 1:
        return legendre[difference]
    non_residue = int(np.argmin(legendre))
    a, b = difference[:, None, :, None], difference[None, :, None, :]
    return legendre[(a * a - non_residue * b * b) % p].reshape(p * p, p * p)


def _bordered(core: np.ndarray, sign: int) -> np.ndarray:
    matrix = np.zeros((len(core) + 1, len(core) + 1), np.int8)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, sign, core
    return matrix


def _paley_first(p: int, degree: int) -> np.ndarray:
    core = _jacobsthal(p, degree)
    return _bordered(core, -1) + np.eye(len(core) + 1, dtype=np.int8)


def _paley_second(p: int, degree: int) -> np.ndarray:
    conference = _bordered(_jacobsthal(p, degree), 1)
    on, off = np.array([[1, -1], [-1, -1]], np.int8), np.array([[1, 1], [1, -1]], np.int8)
    return np.kron(conference, off) + np.kron(np.eye(len(conference), dtype=np.int8), on)


# Generators of the multiplier group under which the circulants' first rows are invariant: it makes
# the search small.
_CIRCULANT_MULTIPLIERS = {39: (16,), 43: (6, 42)}


def _goethals_seidel(n: int) -> np.ndarray:
    a, b, c, d = (np.stack([np.roll(row, i) for i in range(n)]) for row in _four_circulants(n))
    br, cr, dr = b[:, ::-1], c[:, ::-1], d[:, ::-1]
    btr, ctr, dtr = b.T[:, ::-1], c.T[:, ::-1], d.T[:, ::-1]
    return np.block(
        [[a, br, cr, dr], [-br, a, dtr, -ctr], [-cr, -dtr, a, btr], [-dr, ctr, -btr, a]]
    )


def _invariant_rows(n: int) -> np.ndarray:
    """All +-1 rows of length n that start with +1 and are constant on the multiplier group's
    orbits.
    """
    orbit = np.zeros(n, np.int64)
    for start in range(1, n):
        if orbit[start]:
            continue
        orbit[start], pending = orbit.max() + 1, [start]
        while pending:
            element = pending.pop()
            for factor in _CIRCULANT_MULTIPLIERS[n]:
                image = element * factor % n
                if not orbit[image]:
                    orbit[image] = orbit[start]
                    pending.append(image)
    count = int(orbit.max())
    bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    signs = np.concatenate([np.ones((2**count, 1), np.int64), 1 - 2 * bits], axis=1)
    return signs[:, orbit].astype(np.int8)


def _four_circulants(n: int) -> np.ndarray:
    """Four +-1 rows [4, n] whose circulants satisfy AA^T + BB^T + CC^T + DD^T = 4n I.

    Equivalently their power spectra sum to 4n at every frequency. Two pairs of rows meet in the
    middle: pair spectra are compared through one random projection and the hits are checked in
    full.
    """
    rows = _invariant_rows(n)
    spectra = np.abs(np.fft.rfft(rows, axis=1)) ** 2
    keep = np.all(spectra <= 4 * n + 1e-6, axis=1)
    rows, spectra = rows[keep], spectra[keep]
    _, unique = np.unique(np.round(64 * spectra).astype(np.int64), axis=0, return_index=True)
    rows, spectra = rows[unique], spectra[unique]
    first, second = np.triu_indices(len(rows))
    fits = np.all(spectra[first] + spectra[second] <= 4 * n + 1e-6, axis=1)
    first, second = first[fits], second[fits]
    direction = np.random.default_rng(0).standard_normal(spectra.shape[1])
    sums = (spectra @ direction)[first] + (spectra @ direction)[second]
    order = np.argsort(sums)
    first, second, sums = first[order], second[order], sums[order]
    wanted = 4 * n * direction.sum() - sums
    low, high = np.searchsorted(sums, wanted - 1e-6), np.searchsorted(sums, wanted + 1e-6)
    for pair in np.nonzero(high > low)[0]:
        for other in range(low[pair], high[pair]):
            four = [first[pair], second[pair], first[other], second[other]]
            if np.allclose(spectra[four].sum(0), 4 * n, atol=1e-6):
                return rows[four]
    raise AssertionError(f"no four circulants of length {n}")
