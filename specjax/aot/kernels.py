"""The kernels of this package at the shapes of real models, compiled for a target: what each takes."""

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from specjax.aot import resources, shapes
from specjax.aot.compile import Compiler
from specjax.errors import ConfigError, SpecjaxError
from specjax.pallas.device import Gpu
from specjax.pallas.matmul import specs as matmul_specs

MATMULS = matmul_specs.ops()
TRITON = "matmul_w4a16_triton"
OPS = (*MATMULS, TRITON, "tree_attention", "glue")
_MODELS = ("llama3-8b", "llama3-70b", "smollm2-135m")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One launch to compile.

    Attributes:
        op: the op.
        name: unique within the op.
        function: launches the kernel; takes `arguments` by keyword.
        arguments: their abstract values.
        weights_per_thread: numbers that a thread multiplies in one pass of the main loop; None: not counted.
        matrix: it must have matrix instructions.
    """

    op: str
    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    weights_per_thread: int | None = None
    matrix: bool = True


def cases(
    op: str, models: Sequence[str], rows: Sequence[int], target: Gpu, dtype: str
) -> Iterator[Case]:
    """The launches of an op for models, numbers of rows (tokens or tree nodes) and a GPU."""
    if op not in OPS:
        raise ConfigError(f"op={op!r} is unknown; known ops: {', '.join(OPS)}")
    unknown = [model for model in models if model not in _MODELS]
    if unknown:
        raise ConfigError(f"model shape {unknown[0]!r} is unknown; known: {', '.join(_MODELS)}")
    if op == "tree_attention":
        yield from _attention_cases(models, rows, target.arch, dtype)
    elif op == "glue":
        yield from _glue_cases(models, rows, dtype)
    elif op == TRITON:
        yield from _triton_cases(models, rows, target, dtype)
    else:
        yield from _matmul_cases(op, models, rows, target, dtype)


def _attention_cases(models, rows, arch, dtype) -> Iterator[Case]:
    from specjax.pallas.tree_attention import mosaic, specs

    for model in models:
        for nodes in rows:
            arguments = specs.SPECS[model].arguments(nodes, 4096, jnp.dtype(dtype))
            absent = {name: value for name, value in arguments.items() if value is None}
            yield Case(
                op="tree_attention",
                name=f"{model}/{nodes} nodes/{dtype}",
                function=functools.partial(mosaic.tree_attention, arch=arch, **absent),
                arguments={k: v for k, v in arguments.items() if k not in absent},
            )


def _matmul_cases(op, models, rows, target: Gpu, dtype) -> Iterator[Case]:
    from specjax.pallas.matmul import mosaic, tiles

    for name, spec in matmul_specs.of(op).items():
        if name.partition("/")[0] not in models:
            continue
        form, bits = spec.weight().form, spec.operand_bits
        for count in rows:
            tile = mosaic.m_tile(count, bits, target.arch)
            config = tiles.lookup(op, form, tile, bits, target)
            yield Case(
                op=op,
                name=f"{name}/{count} rows" + (f"/{dtype}" if bits == 16 else ""),
                function=functools.partial(mosaic.matmul, arch=target.arch),
                arguments=spec.arguments(count, jnp.dtype(dtype)),
                weights_per_thread=mosaic.weights_per_thread(config),
            )


def _triton_cases(models, rows, target: Gpu, dtype) -> Iterator[Case]:
    from specjax.pallas.matmul import triton

    for name, spec in matmul_specs.of(TRITON.removesuffix("_triton")).items():
        # Zeros and minima are not the kernel's business, nor are rows within a tile: it would be the same kernel.
        if name.partition("/")[0] not in models or spec.variant.zeros or spec.variant.minima:
            continue
        for count in sorted({triton.row_tile(count) for count in rows}):
            yield Case(
                op=TRITON,
                name=f"{name}/{count} rows/{dtype}",
                function=functools.partial(triton.matmul, arch=target.arch),
                arguments=spec.arguments(count, jnp.dtype(dtype)),
            )


def _glue_cases(models, rows, dtype) -> Iterator[Case]:
    from specjax.pallas.glue import kernels
    from specjax.pallas.tree_attention import specs

    for model in models:
        spec, hidden = specs.SPECS[model], matmul_specs.MODELS[model]["qkv"][1]
        if hidden % 1024 or spec.head_dim % 128:
            continue  # XLA's own kernels run there
        sizes = dict(hidden=hidden, layers=shapes.lookup(model).num_layers)
        for count in rows:
            for name, function, arguments in _glue(kernels, spec, count, jnp.dtype(dtype), **sizes):
                yield Case(
                    op="glue",
                    name=f"{name}/{model}/{count} rows/{dtype}",
                    function=_positional(function),
                    arguments={"arguments": arguments},
                    matrix=False,
                )


def _glue(kernels, spec, rows: int, dtype, *, hidden: int, layers: int) -> Iterator[tuple]:
    """Name, function and abstract arguments of each glue kernel."""

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache = shape(1, spec.kv_heads, 4096, spec.head_dim, dtype=dtype)
    start, path = shape(1, dtype=jnp.int32), shape(1, 7, dtype=jnp.int32)
    group, padded = spec.heads // spec.kv_heads, -(-rows // 8) * 8
    width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    yield (
        "residual_norm",
        functools.partial(kernels.residual_norm, eps=1e-5),
        (shape(4, padded, hidden), shape(rows, hidden, dtype=dtype), shape(hidden, dtype=dtype)),
    )
    tables = (shape(1, rows, spec.head_dim),) * 2
    yield (
        "rotate_and_write",
        functools.partial(kernels.rotate_and_write, heads=spec.heads, num_rows=64 * group),
        (shape(2, padded, width), *tables, cache, cache, start),
    )
    sums = shape(16, 1, spec.kv_heads, padded * group)
    yield (
        "combine",
        functools.partial(kernels.combine, nodes=rows, group=group, dtype=dtype),
        (shape(*sums.shape, spec.head_dim), sums, sums),
    )
    yield "move_rows", kernels.move_rows, ([cache] * 2 * layers, start, path)


def _positional(function):
    return lambda arguments: function(*arguments)


def run(
    compiler: Compiler,
    ops: Sequence[str],
    models: Sequence[str],
    rows: Sequence[int],
    dtype: str,
    only: str = "",
) -> list[dict[str, Any]]:
    """Entry for `compile.in_process`: a row per kernel, its error in place of figures where it does not compile.

    Args:
        only: cases whose name begins so; glue kernels are always compiled.
    """
    found = []
    for op in ops:
        for case in cases(op, models, rows, compiler.target, dtype):
            if op in (*MATMULS, TRITON) and not case.name.startswith(only):
                continue
            found += measure(compiler, case)
            print(found[-1], flush=True)
    return found


def measure(compiler: Compiler, case: Case) -> list[dict[str, Any]]:
    """Compiles a case; one row for each distinct kernel of ours in it."""
    folder = compiler.triton_dump if case.op == TRITON else compiler.mosaic_dump
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row = {"op": case.op, "case": case.name, "target": compiler.target.kind}
    try:
        compiled = compiler.compile(case.function, case.arguments, name="kernel")
    except SpecjaxError:
        raise
    except Exception as error:  # whatever a compiler raises is the result of this case
        return [row | {"error": " ".join(str(error).split())[:500]}]
    row["seconds"] = round(compiled.seconds, 2)
    stems = sorted(path.with_suffix("") for path in folder.rglob("*.ptx"))
    if not stems:
        return [row | {"error": "the program has no kernel of ours"}]
    read = resources.read_triton if case.op == TRITON else resources.read
    taken = [read(stem, compiler.target.sm) for stem in stems]
    # One kernel of several has to multiply: attention's second one adds up the parts of the first.
    matrix = case.matrix and not any(_multiplies(each, compiler.target, case.op) for each in taken)
    shutil.rmtree(compiled.dump, ignore_errors=True)
    return [row | _figures(compiler.target, case, each, matrix) for each in taken]


def _figures(target: Gpu, case: Case, taken: resources.Resources, matrix: bool) -> dict[str, Any]:
    figures = asdict(taken) | {
        "shared_memory_limit": target.shared_memory,
        "matrix": taken.matrix_instructions,
        "problems": problems(taken, target, matrix),
    }
    if case.weights_per_thread and taken.loop:
        figures["per_weight"] = taken.per_weight(case.weights_per_thread, 1)
    return figures


def problems(taken: resources.Resources, target: Gpu, matrix: bool = True) -> list[str]:
    """What a kernel of this package must not do on `target`; with `matrix` it must multiply matrices."""
    found = []
    if taken.spill_bytes:
        found.append(f"{taken.spill_bytes} bytes of registers spilled")
    if taken.shared_memory > target.shared_memory:
        found.append(
            f"{taken.shared_memory} bytes of shared memory, the limit is {target.shared_memory}"
        )
    if matrix and taken.instructions and not _multiplies(taken, target):
        found.append(f"no matrix instruction ({' or '.join(_matrix_instructions(target))})")
    return found


def _multiplies(taken: resources.Resources, target: Gpu, op: str = "") -> bool:
    # Triton's dot of 16 rows is mma.sync on Hopper, too.
    wanted = resources.MMA if op == TRITON else _matrix_instructions(target)
    return any(name in taken.instructions for name in wanted)


def _matrix_instructions(target: Gpu) -> tuple[str, ...]:
    return ("HGMMA", "IGMMA") if target.arch[0] == 9 else ("HMMA", "IMMA")
