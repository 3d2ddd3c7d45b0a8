"""Kernels as something to check and to time: their arguments, drawn at random, and the reference beside them."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.shared import kernel_timing as timing
from specjax.aot import kernels
from specjax.doctor import cases
from specjax.errors import ConfigError
from specjax.pallas.matmul import specs

OPS = (*kernels.MATMULS, "tree_attention")
# A buffer set must exceed the last-level cache of any GPU there is.
_ROTATED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel at one shape.

    Attributes:
        kernel: (x, *weights) -> output.
        reference: the same, in XLA.
        draw_x: random inputs from a seed.
        draw_weights: random arguments beside them from a seed; of products, also around a weight drawn before.
        num_bytes: of those.
        flops: of one call.
        shape_nk: outputs and inputs of a matmul, for the cuBLAS peer.
    """

    kernel: Callable
    reference: Callable
    draw_x: Callable[[int], Any]
    draw_weights: Callable[[int], tuple]
    num_bytes: int
    flops: float
    shape_nk: tuple[int, int] | None = None

    @property
    def copies(self) -> int:
        """Sets of weights that no cache holds, or as many as a chain has links."""
        return min(max(2, -(-_ROTATED_BYTES // self.num_bytes)), timing.LINKS)

    def rotated_weights(self) -> list[tuple]:
        """So many sets."""
        return [self.draw_weights(2 + i) for i in range(self.copies)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A job to make: making one may fail as well as running it.

    Attributes:
        op, shape, rows: what.
        context: tokens in the cache before them, of attention.
    """

    op: str
    shape: str
    rows: int
    context: int | None = None

    @property
    def label(self) -> str:
        """The shape, in results."""
        return self.shape if self.context is None else f"{self.shape}/context {self.context}"


def requests(
    ops: Sequence[str], shapes: Sequence[str], counts: Sequence[int], contexts: Sequence[int]
) -> Iterator[Request]:
    """Every op at every shape and number of rows.

    Raises:
        ConfigError: unknown op.
    """
    unknown = [op for op in ops if op not in OPS]
    if unknown:
        raise ConfigError(f"op={unknown[0]!r} is unknown; known: {', '.join(OPS)}")
    for op in ops:
        if op == "tree_attention":
            for shape, context, rows in itertools.product(shapes, contexts, counts):
                yield Request(op=op, shape=shape, rows=rows, context=context)
            continue
        for name in specs.of(op):
            if name.partition("/")[0] in shapes:
                yield from (Request(op=op, shape=name, rows=rows) for rows in counts)


def matmul_job(spec: specs.Spec, rows: int, dtype: str, arch: tuple[int, int]) -> Job:
    """A product of `rows` rows with a packed weight."""
    arguments = spec.arguments(rows, jnp.dtype(dtype))
    x = arguments.pop("x")
    names = tuple(arguments)

    def draw_weights(seed: int, weight=None) -> tuple:
        beside = {name: array for name, array in arguments.items() if name != "weight"}
        weight = draw_weight(spec, seed) if weight is None else weight
        drawn = timing.random_tree(seed, beside) | {"weight": weight}
        return tuple(drawn[name] for name in names)

    return Job(
        kernel=functools.partial(matmul_kernel, names, arch),
        reference=functools.partial(matmul_reference, names),
        draw_x=functools.partial(timing.random_tree, tree=x),
        draw_weights=draw_weights,
        num_bytes=_bytes(arguments),
        flops=2.0 * rows * spec.n * spec.k,
        shape_nk=(spec.n, spec.k),
    )


def matmul_kernel(names: tuple[str, ...], arch: tuple[int, int], x, *weights, config=None):
    """The product of Mosaic's kernel; `names` are those of the arguments beside x."""
    from specjax.pallas.matmul import mosaic

    return mosaic.matmul(x, **dict(zip(names, weights, strict=True)), arch=arch, config=config)


def matmul_reference(names: tuple[str, ...], x, *weights):
    """The same in XLA, from the canonical weight."""
    from specjax.pallas.matmul import packed, reference

    given = dict(zip(names, weights, strict=True))
    return reference.matmul(x, **given | {"weight": packed.unpack(given["weight"])})


def draw_weight(spec: specs.Spec, seed: int):
    """A packed weight of random codes under tables of usual sizes; on the device but for the tables."""
    return _packed(spec)(jax.random.key(seed), cases.tables(spec))


@functools.lru_cache(maxsize=4)
def _packed(spec: specs.Spec) -> Callable:
    abstract = spec.canonical()["codes"]

    def draw(key, tables):
        if spec.format.integer:
            info = jnp.iinfo(abstract.dtype)
            codes = jax.random.randint(key, abstract.shape, int(info.min), int(info.max) + 1)
        else:
            codes = jax.random.normal(key, abstract.shape) * 2
        return spec.pack({**tables, "codes": codes.astype(abstract.dtype)})

    return jax.jit(draw)


def attention_job(shape: str, context: int, rows: int, dtype: str) -> Job:
    """Attention of `rows` nodes after `context` tokens; the cache has no spare slots beside them."""
    from specjax.pallas.tree_attention import mosaic, reference
    from specjax.pallas.tree_attention.specs import SPECS

    spec = SPECS[shape]
    capacity = -(-(context + rows) // 64) * 64
    given = spec.arguments(rows, capacity, jnp.dtype(dtype))
    start = jnp.full((1,), context, jnp.int32)
    tail = jnp.tril(jnp.ones((1, rows, rows), bool)) if rows > 1 else None

    def bound(function):
        def run(q, keys, values):
            return function(q, keys, values, start=start, prefix=start, tail=tail)

        return run

    weights = given["keys"], given["values"]
    return Job(
        kernel=bound(mosaic.tree_attention),
        reference=bound(reference.tree_attention),
        draw_x=functools.partial(timing.random_tree, tree=given["q"]),
        draw_weights=functools.partial(timing.random_tree, tree=weights),
        num_bytes=_bytes(weights),
        flops=4.0 * rows * spec.heads * spec.head_dim * (context + rows),
    )


def dense_peer(job: Job) -> Job:
    """A bfloat16 product of the same shape, as XLA hands it to cuBLAS; `job` is of a matmul."""
    (outputs, inputs), rows = job.shape_nk, job.draw_x(0).shape[0]
    weights = (jax.ShapeDtypeStruct((outputs, inputs), jnp.bfloat16),)
    x = jax.ShapeDtypeStruct((rows, inputs), jnp.bfloat16)

    def product(x, weight):
        return x @ weight.T

    return Job(
        kernel=product,
        reference=product,
        draw_x=functools.partial(timing.random_tree, tree=x),
        draw_weights=functools.partial(timing.random_tree, tree=weights),
        num_bytes=_bytes(weights),
        flops=job.flops,
    )


def _bytes(tree) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
