"""How fast are the kernels on this GPU? Against the roofline measured in the same run, and against XLA's own.

    python -m experiments.bench_kernel --ops=matmul_w4a16,tree_attention --shapes=llama3-8b,llama3-70b \\
        --m=1,8,16,32,64 --output=results.jsonl
    python -m experiments.bench_kernel --ops=matmul_w4a16 --write_tuned --output=results.jsonl

First the device's read bandwidth and bfloat16 matmul rate. Then per op, shape and number of rows: correctness on
fresh random inputs, RMS(error) / RMS(reference), and the median time over rotated weights that no cache holds; beside
it cuBLAS in bfloat16 on a weight of that shape, and XLA's dequantize-and-dot. --output gets one row each, appended as
measured. --write_tuned tries tiles, and writes the fastest to specjax/pallas/tuned. Needs an NVIDIA GPU.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments.shared import common, contest, environment, flag_groups, records
from experiments.shared import kernel_timing as timing
from specjax.aot import kernels
from specjax.errors import ConfigError
from specjax.pallas import device, tuned
from specjax.pallas.matmul import specs

OPS = (*kernels.MATMULS, "tree_attention")
# A buffer set must exceed the last-level cache of any GPU there is.
_ROTATED_BYTES = 256 << 20
_TOLERANCE = {"float16": 2e-3, "bfloat16": 4e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One thing to time.

    Attributes:
        op, shape, rows: what.
        kernel: (x, *weights) -> output.
        reference: the same, in XLA.
        x, weights: abstract arguments.
        flops: of one call.
        shape_nk: outputs and inputs of a matmul, for the cuBLAS peer.
    """

    op: str
    shape: str
    rows: int
    kernel: Any
    reference: Any
    x: Any
    weights: tuple
    flops: float
    shape_nk: tuple[int, int] | None = None


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_list("ops", list(OPS), "Kernels to time.", flag_values=values)
        flags.DEFINE_list(
            "shapes", ["llama3-8b"], "Models whose shapes to use.", flag_values=values
        )
        flags.DEFINE_list("m", ["1", "8", "16", "32", "64"], "Rows.", flag_values=values)
        flags.DEFINE_list("contexts", ["1024", "4096"], "Cache lengths.", flag_values=values)
        flags.DEFINE_enum("dtype", "float16", list(_TOLERANCE), "Float inputs.", flag_values=values)
        flags.DEFINE_boolean("peers", True, "Time XLA's own matmuls too.", flag_values=values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
        flags.DEFINE_boolean("write_tuned", False, "Tune tiles and write them.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints the table."""
    gpu = device.current()
    if gpu is None or jax.default_backend() != "gpu":
        raise ConfigError(
            f"bench_kernel needs an NVIDIA GPU that Mosaic supports; JAX has {jax.devices()[0].device_kind}. "
            "Without one, experiments.aot_compile tells what the kernels take"
        )
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    run = environment.record()
    limits = {
        "read_bandwidth": timing.read_bandwidth(4 << 30),
        "matmul_rate": timing.matmul_rate(8192),
    }
    print(f"{gpu.kind}: {limits['read_bandwidth'] / 1e12:.2f} TB/s read, ", end="")
    print(f"{limits['matmul_rate'] / 1e12:.0f} TFLOP/s in bfloat16")
    rows = [{"record": "device", **limits, "environment": run}]
    if output is not None:
        records.append_rows(output, rows)
    for job in tqdm(list(jobs(values, gpu)), unit="kernel", disable=None):
        row = measure(job, limits, values.dtype, values.peers)
        rows.append(row)
        if output is not None:
            records.append_rows(output, [row])
    print_table(rows[1:])
    if values.write_tuned:
        for op in values.ops:
            if op in kernels.MATMULS:
                print(f"tuned tiles -> {write_tuned(op, values, gpu)}")


def jobs(values: flags.FlagValues, gpu: device.Gpu) -> Iterator[Job]:
    """What the flags ask for."""
    try:
        counts = [int(value) for value in values.m]
        contexts = [int(value) for value in values.contexts]
    except ValueError:
        raise ConfigError("--m and --contexts: expected lists of whole numbers") from None
    unknown = [op for op in values.ops if op not in OPS]
    if unknown:
        raise ConfigError(f"op={unknown[0]!r} is unknown; known: {', '.join(OPS)}")
    for op in values.ops:
        if op == "tree_attention":
            for shape, context, rows in itertools.product(values.shapes, contexts, counts):
                yield attention_job(shape, context, rows, values.dtype)
            continue
        for name, spec in specs.of(op).items():
            if name.partition("/")[0] in values.shapes:
                for rows in counts:
                    yield matmul_job(op, name, spec, rows, values.dtype, gpu.arch)


def matmul_job(op: str, name: str, spec, rows: int, dtype: str, arch) -> Job:
    """A product of `rows` rows with a packed weight."""
    from specjax.pallas.matmul import mosaic, packed, reference

    arguments = spec.arguments(rows, jnp.dtype(dtype))
    x = arguments.pop("x")
    names = tuple(arguments)

    def kernel(x, *weights, config=None):
        return mosaic.matmul(x, **dict(zip(names, weights, strict=True)), arch=arch, config=config)

    def plain(x, *weights):
        given = dict(zip(names, weights, strict=True))
        return reference.matmul(x, **given | {"weight": packed.unpack(given["weight"])})

    return Job(
        op=op,
        shape=name,
        rows=rows,
        kernel=kernel,
        reference=plain,
        x=x,
        weights=tuple(arguments.values()),
        flops=2.0 * rows * spec.n * spec.k,
        shape_nk=(spec.n, spec.k),
    )


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

    return Job(
        op="tree_attention",
        shape=f"{shape}/context {context}",
        rows=rows,
        kernel=bound(mosaic.tree_attention),
        reference=bound(reference.tree_attention),
        x=given["q"],
        weights=(given["keys"], given["values"]),
        flops=4.0 * rows * spec.heads * spec.head_dim * (context + rows),
    )


def measure(job: Job, limits: dict[str, float], dtype: str, peers: bool) -> dict[str, Any]:
    """Correctness and times of a job."""
    row = {"record": "kernel", "op": job.op, "shape": job.shape, "rows": job.rows, "dtype": dtype}
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(timing.random_tree(0, job.weights)))
    copies = max(2, -(-_ROTATED_BYTES // num_bytes))
    x = timing.random_tree(1, job.x)
    weights = [_scaled(timing.random_tree(2 + i, job.weights)) for i in range(copies)]
    got = np.asarray(jax.jit(job.kernel)(x, *weights[0]), np.float64)
    wanted = np.asarray(jax.jit(job.reference)(x, *weights[0]), np.float64)
    error = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
    times = timing.seconds_per_call(job.kernel, x, weights)
    floor = max(num_bytes / limits["read_bandwidth"], job.flops / limits["matmul_rate"])
    seconds = float(np.median(times))
    row |= {
        "relative_error": error,
        "correct": error <= _TOLERANCE[dtype],
        "us": seconds * 1e6,
        "us_quartiles": [float(q) * 1e6 for q in np.percentile(times, [25, 75])],
        "bytes": num_bytes,
        "flops": job.flops,
        "roofline_us": floor * 1e6,
        "roofline_share": floor / seconds if seconds > 0 else None,
    }
    if peers:
        row |= _peers(job, x, weights, dtype)
    return row


def _scaled(weights: tuple) -> tuple:
    """Random scales are normal; their magnitude is made that of real ones."""
    return jax.tree.map(
        lambda leaf: leaf * 0.01 if leaf.ndim == 3 and leaf.dtype == jnp.float16 else leaf, weights
    )


def _peers(job: Job, x, weights, dtype: str) -> dict[str, float]:
    few = weights[: max(1, len(weights) // 4)]
    found = {"xla_us": float(np.median(timing.seconds_per_call(job.reference, x, few, 8))) * 1e6}
    if job.shape_nk is not None:
        dense = jax.ShapeDtypeStruct(job.shape_nk, jnp.bfloat16)
        copies = max(2, -(-_ROTATED_BYTES // (2 * dense.size)))
        many = [(timing.random_tree(100 + i, dense),) for i in range(copies)]
        rows = timing.random_tree(99, jax.ShapeDtypeStruct((job.rows, dense.shape[1]), dense.dtype))
        times = timing.seconds_per_call(lambda x, w: x @ w.T, rows, many)
        found["cublas_bf16_us"] = float(np.median(times)) * 1e6
    return found


def print_table(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """Prints kernel rows as a table."""
    table = Table()
    for header in ("op", "shape", "rows", "us", "of roofline", "error", "XLA us", "cuBLAS bf16 us"):
        table.add_column(header, justify="left" if header in ("op", "shape") else "right")
    for row in rows:
        share = row["roofline_share"]
        table.add_row(
            *(row["op"], row["shape"], str(row["rows"]), f"{row['us']:.2f}"),
            "-" if share is None else f"{share:.0%}",
            f"{row['relative_error']:.1e}" + ("" if row["correct"] else " WRONG"),
            *(f"{row[name]:.2f}" if name in row else "-" for name in ("xla_us", "cublas_bf16_us")),
        )
    contest.show(table, console)


def write_tuned(op: str, values: flags.FlagValues, gpu: device.Gpu) -> Path:
    """Tries tiles for every weight of the shapes; writes those with the least time, summed over the rows."""
    path = Path(tuned.__file__).parent / tuned.folder_name(gpu.kind) / f"{op}.json"
    entries = json.loads(path.read_text()) if path.is_file() else {}
    for name, spec in specs.of(op).items():
        if name.partition("/")[0] not in values.shapes:
            continue
        form = spec.weight().form
        key = tuned.weight_key(form.out_features, form.in_features, form.table_group)
        entries[key] = _tuned_entry(op, name, spec, [int(m) for m in values.m], values.dtype, gpu)
    text = json.dumps(entries, indent=1)
    tuned.parse(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
    return path


def _tuned_entry(op, name, spec, counts, dtype, gpu) -> dict[str, Any]:
    """The splits that are best over all row counts, and for each row tile the best steps and stages under them."""
    from specjax.pallas.matmul import mosaic, tiles
    from specjax.pallas.matmul.plan import Config

    form, best = spec.weight().form, {}
    row_tiles = sorted({mosaic.m_tile(count, spec.operand_bits, gpu.arch) for count in counts})
    first = tiles.heuristic(form, row_tiles[0], spec.operand_bits, gpu)
    options = sorted({max(1, first.splits + change) for change in (-2, -1, 0, 1, 2, 4)})
    for splits in options:
        total, rows = 0.0, {}
        for tile in row_tiles:
            found = []
            for steps, stages in itertools.product((1, 2, 4), (3, 4, 5, 6)):
                config = Config(tiles_per_step=steps, num_stages=stages, splits=splits)
                seconds = _time_config(op, name, spec, tile, dtype, gpu, config)
                if seconds is not None:
                    found.append((seconds, {"tiles_per_step": steps, "num_stages": stages}))
            if not found:
                break
            seconds, rows[str(tile)] = min(found, key=lambda pair: pair[0])
            total += seconds
        if len(rows) == len(row_tiles) and (not best or total < best["seconds"]):
            best = {"seconds": total, "splits": splits, "rows": rows}
    if not best:
        raise ConfigError(f"{op} {name}: no tiles compile on {gpu.kind}")
    return {"splits": best["splits"], "rows": best["rows"]}


def _time_config(op, name, spec, rows, dtype, gpu, config) -> float | None:
    """Seconds with these tiles; None where they do not fit the weight or the device."""
    job = matmul_job(op, name, spec, rows, dtype, gpu.arch)
    kernel = functools.partial(job.kernel, config=config)
    x, weights = timing.random_tree(1, job.x), [timing.random_tree(2, job.weights)]
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    copies = max(2, -(-_ROTATED_BYTES // num_bytes))
    weights = [timing.random_tree(2 + i, job.weights) for i in range(copies)]
    try:
        return float(np.median(timing.seconds_per_call(kernel, x, weights, 16)))
    except (ConfigError, ValueError, jax.errors.JaxRuntimeError):
        return None


if __name__ == "__main__":
    common.run(define_flags, main)
