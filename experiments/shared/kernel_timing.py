"""Timing of kernels that take microseconds: chains of them in one program, over buffers that no cache holds.

A chain runs one kernel after the other on weights in turn, each waiting for the one before it; a second chain does the
same without the kernel. The difference of the two, per link, is the kernel: dispatch and what joins the links cancel.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.engine.program import CommandBuffers, gpu_options

LINKS = 64
_REPEATS = 7


def random_like(key, leaf) -> jax.Array:
    """A random array for an abstract one: all codes, scales near 1 %, normal floats."""
    dtype = jnp.dtype(leaf.dtype)
    if dtype == jnp.bool_:
        return jax.random.bernoulli(key, 0.5, leaf.shape)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        wide = jax.random.randint(key, leaf.shape, max(info.min, -128), min(info.max, 255) + 1)
        return wide.astype(dtype)
    return jax.random.normal(key, leaf.shape, jnp.float32).astype(dtype)


def random_tree(seed: int, tree: Any) -> Any:
    """Random arrays for a pytree of abstract ones."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
    return structure.unflatten([random_like(*pair) for pair in zip(keys, leaves, strict=False)])


def _linked(carry: jax.Array, output: jax.Array) -> jax.Array:
    """`carry`, made to wait for `output`: what is added is zero in a way that the compiler cannot know."""
    seen = output.reshape(-1)[0].astype(jnp.float32)
    return carry.at[(0,) * carry.ndim].add((jnp.minimum(jnp.abs(seen), 0.0)).astype(carry.dtype))


def chain(function: Callable, links: int) -> Callable:
    """A program that calls function(x, *weights[i]) for i = 0 .. links - 1 modulo their number, one after the other."""

    def run(x, weights):
        for index in range(links):
            # The barrier keeps the compiler from computing only the one number that `_linked` looks at.
            output = jax.lax.optimization_barrier(function(x, *weights[index % len(weights)]))
            x = _linked(x, output)
        return x

    return run


def device_answers() -> bool:
    """Whether anything runs on the device still: after a fault of a kernel nothing does, in this process."""
    try:
        return int(jnp.ones((2,), jnp.int32).sum()) == 2
    except Exception:  # whatever a lost device raises
        return False


def seconds_per_call(
    function: Callable,
    x: jax.Array,
    weights: Sequence[tuple],
    links: int | None = None,
    command_buffers: CommandBuffers = "loop",
) -> list[float]:
    """Seconds that `function` takes, one value per repeat.

    Args:
        function: (x, *weights) -> array.
        x: floats or integers; passed to every link.
        weights: arguments that the links take in turn, together larger than the last-level cache.
        links: calls in one program; default `LINKS`.
        command_buffers: see `engine.program.gpu_options`.
    """
    links = LINKS if links is None else links
    options = gpu_options(command_buffers) if jax.default_backend() == "gpu" else None

    def empty(x, *weights):
        return x

    programs = []
    for step in (function, empty):
        # The links' own jit: traced and lowered once, not once a link.
        jitted = jax.jit(chain(jax.jit(step), links))
        programs.append(jitted.lower(x, weights).compile(compiler_options=options))
    times: list[list[float]] = [[], []]
    for repeat in range(_REPEATS + 1):
        for program, measured in zip(programs, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(program(x, weights))
            if repeat:  # the first run warms up
                measured.append(time.perf_counter() - begin)
    base = float(np.median(times[1]))
    return [max(value - base, 0.0) / links for value in times[0]]


def read_bandwidth(num_bytes: int) -> float:
    """Bytes per second at which the device reads a large array once."""
    data = jnp.ones((num_bytes // 4 // 4096, 4096), jnp.int32)
    reader = jax.jit(lambda x: jnp.max(x, axis=1)).lower(data).compile()
    return data.nbytes / _best(lambda: reader(data))


def matmul_rate(size: int) -> float:
    """Floating-point operations per second of a square bfloat16 matmul."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b).lower(a, a).compile()
    return 2 * size**3 / _best(lambda: product(a, a))


def _best(work: Callable) -> float:
    jax.block_until_ready(work())
    found = []
    for _ in range(2 * _REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(work())
        found.append(time.perf_counter() - begin)
    return min(found)
