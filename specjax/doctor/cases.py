"""Small shapes of every family of kernels, with random arguments and the reference beside the kernel."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from specjax.doctor import workers
from specjax.doctor.checker import Case, Checker
from specjax.errors import ConfigError
from specjax.pallas import device, dispatch
from specjax.pallas.glue.parts import Parts
from specjax.pallas.matmul import api, packed, reference, specs
from specjax.pallas.matmul.form import PackedWeight
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.formats.base import Format, Variant

# Rows that fill a tile of a matrix instruction, that do not, and more than one tile.
_ROWS = (1, 8, 17, 64, 100)
_OUTPUTS, _MOST = 192, 8
_TOLERANCE = {jnp.float16: 2e-3, jnp.bfloat16: 8e-3}
_INTEGER_TOLERANCE = 1e-5


def checker(op: str, backend: str, kernels: str | None = None) -> Checker:
    """The family of an op on a backend: the entry of the doctor's processes.

    Args:
        kernels: "package.module:function", a function of the op's name and the reference, whose result takes the
            kernel's place: to try what is around it without a GPU.
    Raises:
        ConfigError: there is no such family.
    """
    makers = {"tree_attention": _attention, "glue": _glue} | dict.fromkeys(specs.ops(), _matmuls)
    if op not in makers or backend not in ("mosaic", "triton"):
        raise ConfigError(f"{op=}, {backend=}: known are {', '.join(makers)} on mosaic or triton")
    if kernels is not None:
        return Checker(cases=[_standing_in(kernels, op, case) for case in makers[op](op, "xla")])
    unavailable = device.unsupported() if backend == "mosaic" else _triton_unavailable()
    if unavailable is not None:
        return Checker(unavailable=unavailable)
    return Checker(cases=list(makers[op](op, backend)))


def _standing_in(kernels: str, op: str, case: Case) -> Case:
    return dataclasses.replace(case, kernel=workers.entry(kernels)(op, case.reference))


def reference_itself(op: str, reference: Callable) -> Callable:
    """For `kernels`: what is compared with the reference is the reference."""
    del op
    return reference


def _triton_unavailable() -> str | None:
    from specjax.pallas.matmul import triton

    return triton.unavailable()


def variants(op: str, backend: str) -> list[tuple[Format, Variant]]:
    """Weights of an op that a backend's kernels take; unlike sizes, which are the caller's."""
    return [
        (format, variant)
        for format in registry.formats()
        for variant in format.variants()
        if format.op(variant.input_bits) == op and backend in format.backends(variant.input_bits)
    ]


def tables(spec: specs.Spec, seed: int = 0) -> dict[str, np.ndarray | None]:
    """Scales and what else a weight has beside codes: plain normal numbers would round whole formats to zero."""
    rng, abstract = np.random.default_rng(seed), spec.canonical()
    shape = spec.n, spec.k // spec.group_size
    of_groups = abstract["channel_scales"] is not None or not spec.format.two_level
    draw = spec.format.random_tables if of_groups else Format.random_tables.__get__(spec.format)
    drawn = draw(rng, *shape)
    drawn["minima"] = rng.normal(0, 0.1, shape)
    return {
        name: None if array is None else drawn[name].astype(array.dtype)
        for name, array in abstract.items()
        if name != "codes"
    }


def _matmuls(op: str, backend: str) -> Iterator[Case]:
    """Every kind of weight once, with numbers of rows and inputs in turn."""
    found = variants(op, backend)
    count = min(_MOST, max(5, len(found)))
    for index, (format, variant) in enumerate(itertools.islice(itertools.cycle(found), count)):
        inputs = (640, 512)[index // len(found) % 2]
        rows, dtype = _ROWS[index % len(_ROWS)], (jnp.float16, jnp.bfloat16)[index % 2]
        name = f"{format.name} {variant.name or 'plain'}".strip()
        spec = specs.Spec(name=name, n=_OUTPUTS, k=inputs, format=format, variant=variant)
        yield _matmul(spec, backend, rows, dtype, seed=index)


def _matmul(spec: specs.Spec, backend: str, rows: int, dtype, seed: int) -> Case:
    rng, shapes = np.random.default_rng(seed), spec.arguments(rows, dtype)
    given = {name: shapes[name] for name in ("x_scale", "x_sums") if name in shapes}
    given = {n: jnp.asarray(rng.uniform(0.01, 0.1, s.shape), s.dtype) for n, s in given.items()}
    if spec.operand_bits == 16:
        x, tolerance = jnp.asarray(rng.standard_normal((rows, spec.k)), dtype), _TOLERANCE[dtype]
    else:
        most = 2 ** (spec.variant.input_bits - 1) - 1
        codes = rng.integers(-most, most + 1, (rows, spec.k))
        x, tolerance = jnp.asarray(codes, jnp.int8).astype(shapes["x"].dtype), _INTEGER_TOLERANCE
    weight = spec.pack(jax.tree.map(jnp.asarray, tables(spec, seed)) | {"codes": _codes(spec, rng)})
    kind = f"{dtype.__name__}" if spec.operand_bits == 16 else f"int{spec.variant.input_bits}"
    return Case(
        name=f"{spec.name} {spec.n}x{spec.k}, {rows} rows of {kind}",
        kernel=functools.partial(_product, backend, tuple(given)),
        reference=functools.partial(_product, None, tuple(given)),
        arguments=(x, weight, *given.values()),
        tolerance=tolerance,
    )


def _codes(spec: specs.Spec, rng: np.random.Generator) -> jax.Array:
    dtype = spec.canonical()["codes"].dtype
    if spec.format.integer:
        info = jnp.iinfo(dtype)
        codes = rng.integers(int(info.min), int(info.max) + 1, (spec.n, spec.k))
        return jnp.asarray(codes, jnp.int16).astype(dtype)
    return jnp.asarray(rng.standard_normal((spec.n, spec.k)) * 2, jnp.float32).astype(dtype)


def _product(backend: str | None, names: tuple[str, ...], x, weight: PackedWeight, *given):
    """On a backend; None: the definition, of float inputs in float32."""
    beside = dict(zip(names, given, strict=True))
    if backend is not None:
        return api.matmul(x, weight, backend=backend, **beside)
    floats = "x_scale" not in beside
    return reference.matmul(x.astype(jnp.float32) if floats else x, packed.unpack(weight), **beside)


def _attention(op: str, backend: dispatch.Backend) -> Iterator[Case]:
    """Single tokens, trees and chains; both head sizes, groups of queries, an empty sequence in a batch."""
    from specjax.pallas.tree_attention import api as attention
    from specjax.pallas.tree_attention import reference as definition

    shapes = [
        *((1, 1, 8, 2, 128, 256, "chain"), (1, 8, 8, 2, 128, 256, "tree")),
        *((1, 17, 6, 2, 64, 128, "tree"), (2, 8, 4, 4, 64, 256, "chain")),
        *((2, 32, 8, 2, 128, 512, "tree"), (1, 64, 8, 1, 128, 256, "tree")),
    ]
    for index, (batch, nodes, heads, kv_heads, channels, capacity, kind) in enumerate(shapes):
        dtype = (jnp.float16, jnp.bfloat16)[index % 2]
        normal = _normals(index, dtype)
        cache = (batch, kv_heads, capacity, channels)
        lengths = jnp.asarray([capacity // 2 - 3, 0][:batch], jnp.int32)
        tail = _tree(index, batch, nodes) if kind == "tree" else None

        def run(function, q, keys, values, start, tail):
            return function(q, keys, values, start=start, prefix=start, tail=tail)

        yield Case(
            name=f"{batch} x {nodes} nodes ({kind}), {heads}/{kv_heads} heads of {channels}, {dtype.__name__}",
            kernel=functools.partial(
                run, functools.partial(attention.tree_attention, backend=backend)
            ),
            reference=functools.partial(run, definition.tree_attention),
            arguments=(normal(batch, nodes, heads, channels), *_pair(normal, cache), lengths, tail),
            tolerance=_TOLERANCE[dtype],
        )


def _glue(op: str, backend: dispatch.Backend) -> Iterator[Case]:
    """Each kernel of the folder through its public function, against the same on XLA."""
    from specjax.models.norms import RMSNorm
    from specjax.pallas.glue import api as glue

    def norm_of(backend, sums, x, gain):
        added = Parts(sums=sums, shape=x.shape, dtype=x.dtype)
        return glue.residual_norm(x, added, RMSNorm(gain, 1e-5), backend)

    for rows, dtype in ((1, jnp.float16), (17, jnp.bfloat16)):
        normal = _normals(rows, dtype)
        sums = _normals(rows, jnp.float32)(4, -(-rows // 8) * 8, 1024)
        yield _glue_case(
            f"residual_norm, {rows} rows of {dtype.__name__}",
            *(norm_of, backend, (sums, normal(1, rows, 1024), normal(1024)), dtype),
        )
    for batch, nodes, dtype in ((1, 8, jnp.bfloat16), (2, 3, jnp.float16)):
        normal = _normals(nodes, dtype)
        cache, starts = (batch, 2, 64, 128), jnp.asarray([37, 0][:batch], jnp.int32)
        sums = _normals(nodes, jnp.float32)(2, -(-batch * nodes // 8) * 8, 8 * 128)
        angle = _normals(7, jnp.float32)(batch, nodes, 1, 64)
        angle = jnp.concatenate([angle, angle], axis=-1)
        shape = (batch, nodes, 8 * 128)
        yield _glue_case(
            f"rotate_and_write, {batch} x {nodes} nodes of {dtype.__name__}",
            functools.partial(_attended, shape, jnp.dtype(dtype)),
            backend,
            (sums, jnp.cos(angle), jnp.sin(angle), *_pair(normal, cache), starts),
            dtype,
        )
        path = jnp.asarray([[0, 2, 1], [0, 1, 2]][:batch], jnp.int32)
        yield _glue_case(
            f"move_rows, {batch} sequences of {dtype.__name__}",
            *(_moved, backend, (*_pair(normal, cache), starts, path), dtype),
        )


def _glue_case(name: str, function, backend, arguments: tuple, dtype) -> Case:
    return Case(
        name=name,
        kernel=functools.partial(function, backend),
        reference=functools.partial(function, "xla"),
        arguments=arguments,
        tolerance=_TOLERANCE[dtype],
    )


def _moved(backend, keys, values, start, path):
    """The rows of a path to the front, as the cache does it where there is no kernel."""
    from specjax.pallas.glue import api as glue

    moved = glue.move_rows([keys, values], start, path, backend)
    if moved is not None:
        return moved
    batch = jnp.arange(len(start))[:, None]
    slots, new = start[:, None] + path, start[:, None] + jnp.arange(path.shape[1])
    return [a.at[batch, :, new].set(a[batch, :, slots]) for a in (keys, values)]


def _attended(shape, dtype, backend, sums, cos, sin, keys, values, start):
    """Rotary embedding, rows of the cache and attention; the kernels', or what they stand for."""
    from specjax.models import cache as kv
    from specjax.models.rotary import apply_rope
    from specjax.pallas.glue import api as glue
    from specjax.pallas.tree_attention import api as attention
    from specjax.pallas.tree_attention import reference as definition

    projected = Parts(sums=sums, shape=shape, dtype=dtype)
    bounds = dict(start=start, prefix=start, tail=None)
    if glue.can_rotate_and_write(projected, keys, backend):
        return attention.project_and_attend(projected, (cos, sin), keys, values, **bounds)
    kv_heads, channels = keys.shape[1], keys.shape[3]
    rows = projected.value().reshape(*shape[:2], -1, channels)
    heads = rows.shape[2] - 2 * kv_heads
    q, k, v = jnp.split(rows, [heads, heads + kv_heads], axis=2)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    keys = kv.write_rows(keys, k.swapaxes(1, 2), start)
    values = kv.write_rows(values, v.swapaxes(1, 2), start)
    return definition.tree_attention(q, keys, values, **bounds), keys, values


def _normals(seed: int, dtype):
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)


def _pair(normal, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return normal(*shape), normal(*shape)


def _tree(seed: int, batch: int, nodes: int) -> jax.Array:
    """Ancestors of random trees: every node sees itself and what its parent sees."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((batch, nodes, nodes), bool)
    for sequence, node in itertools.product(range(batch), range(nodes)):
        if node:
            mask[sequence, node] = mask[sequence, rng.integers(0, node)]
        mask[sequence, node, node] = True
    return jnp.asarray(mask)
