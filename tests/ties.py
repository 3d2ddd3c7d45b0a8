"""When two outputs may differ: the tie rule of the project's definition of right.

Matrix products of different row counts differ by some 6e-7, so where the target's two best tokens are about equally
likely either may come out. Floats: their logits lie within 1e-3. Quantized activations: a value beside a rounding
boundary gets another code, so they lie within the largest logit change that one flipped code causes.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models import llama
from specjax.quant import activations, view
from tests import tiny

TIE = 1e-3
FLIPS_PER_SITE = 8


class Comparisons:
    """Compares outputs and counts "same" and "tie"."""

    def __init__(self):
        self.outcomes: list[str] = []

    def compare(self, target, prompt: list[int], found: list[int], expected: list[int]) -> None:
        """Equal, or different first where two tokens are as likely."""
        assert len(found) == len(expected)
        if found == expected:
            self.outcomes.append("same")
            return
        pairs = enumerate(zip(found, expected, strict=True))
        at = next(i for i, pair in pairs if pair[0] != pair[1])
        text = prompt + expected[:at]
        logits = tiny.full_logits(target, text)[-1]
        best = set(np.argsort(-logits)[:2].tolist())
        gap = float(np.ptp(logits[list(best)]))
        allowed = max(TIE, largest_flip(target, text) if rounds_inputs(target) else 0.0)
        message = (
            f"at token {at}: {found[at]} for {expected[at]}; the two best differ by {gap:.2e}, "
            f"allowed {allowed:.2e}"
        )
        assert best == {found[at], expected[at]} and gap < allowed, message
        self.outcomes.append("tie")
        print("tie", message)

    def check_rare(self) -> None:
        """At most 1 % of the sequences (one is always allowed)."""
        ties = self.outcomes.count("tie")
        print(f"{ties} ties among {len(self.outcomes)} sequences")
        assert ties <= max(1, len(self.outcomes) / 100)


def rounds_inputs(target) -> bool:
    """Whether any linear quantizes its activations."""
    return any(linear.scheme.activations for _, linear in view.quantized_linears(target))


@contextlib.contextmanager
def _replaced(quantize):
    """Runs with another rounding of activations."""
    original = activations.quantize
    activations.quantize = quantize
    try:
        yield
    finally:
        activations.quantize = original


def _steps(x, out, spec):
    """How far each value is from the nearest rounding boundary, in steps between codes, and the step across it."""
    codes = out.codes.astype(jnp.float32)
    if spec.kind == "int":
        size = jnp.ones_like(codes)
    else:
        info = jnp.finfo(spec.code_dtype)
        exponent = jnp.floor(jnp.log2(jnp.maximum(jnp.abs(codes), float(info.smallest_normal))))
        size = jnp.exp2(exponent - info.nmant)
    error = x.astype(jnp.float32) / jnp.where(out.scale == 0, 1, out.scale) - codes
    return 0.5 - jnp.abs(error) / size, jnp.sign(error) * size


@functools.partial(jax.jit, static_argnames="length")
def _distances(target, tokens, length):
    """Distances from rounding boundaries of the codes of every linear in order, [1, length, K] each."""
    original, found = activations.quantize, []

    def recording(x, spec, sum_groups=None):
        out = original(x, spec, sum_groups)
        found.append(_steps(x, out, spec)[0][:, :length])
        return out

    with _replaced(recording):
        llama.full_logits(target, tokens)
    return found


@functools.partial(jax.jit, static_argnames="length")
def _flipped(target, tokens, length, site, row, column):
    """Logits after the text with one code moved across its nearest boundary; site -1 moves none."""
    original, calls = activations.quantize, itertools.count()

    def flipping(x, spec, sum_groups=None):
        out, here = original(x, spec, sum_groups), next(calls)
        step = _steps(x, out, spec)[1]
        chosen = (jnp.arange(x.shape[1]) == row)[:, None] & (jnp.arange(x.shape[2]) == column)
        codes = out.codes.astype(jnp.float32) + jnp.where(chosen & (site == here), step, 0.0)
        codes = jnp.clip(codes, *spec.code_range).astype(spec.code_dtype)
        return out._replace(codes=codes)

    with _replaced(flipping):
        return llama.full_logits(target, tokens)[0, length - 1]


def largest_flip(target, text: list[int]) -> float:
    """Largest change of the next token's logits by one flipped code, among those nearest to a rounding boundary."""
    padded = np.zeros((1, -(-len(text) // 64) * 64), np.int32)
    padded[0, : len(text)] = text
    tokens = jnp.asarray(padded)
    plain = np.asarray(_flipped(target, tokens, len(text), -1, 0, 0))
    largest = 0.0
    for site, distances in enumerate(_distances(target, tokens, len(text))):
        distances = np.asarray(distances)[0]
        for flat in np.argsort(distances, axis=None)[:FLIPS_PER_SITE]:
            row, column = np.unravel_index(flat, distances.shape)
            moved = np.asarray(_flipped(target, tokens, len(text), site, row, column))
            largest = max(largest, float(np.abs(moved - plain).max()))
    return largest
