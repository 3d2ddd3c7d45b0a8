"""How fast are the kernels on this GPU? Against the roofline measured in the same run, and against XLA's own.

    python -m experiments.bench_kernel --ops=matmul_w4a16,tree_attention --shapes=llama3-8b,llama3-70b \\
        --m=1,8,16,32,64 --output=results.jsonl
    python -m experiments.bench_kernel --ops=matmul_w4a16 --write_tuned --output=results.jsonl

First the device's read bandwidth and bfloat16 matmul rate. Then per op, shape and number of rows: correctness on
fresh random inputs, RMS(error) / RMS(reference), and the median time over rotated weights that no cache holds; beside
it cuBLAS in bfloat16 on a weight of that shape, and XLA's dequantize-and-dot. --output gets one row each, appended as
known; a kernel that fails gets a row with its error, and the others go on. --write_tuned tries tiles for
--tune_minutes, and writes the fastest to specjax/pallas/tuned. Needs an NVIDIA GPU.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments.shared import (
    common,
    contest,
    environment,
    flag_groups,
    kernel_jobs,
    kernel_tuning,
    records,
)
from experiments.shared import kernel_timing as timing
from experiments.shared.kernel_jobs import Job, Request
from specjax.engine import program
from specjax.errors import ConfigError
from specjax.pallas import device

OPS = kernel_jobs.OPS
_TOLERANCE = {"float16": 2e-3, "bfloat16": 4e-3}
_LIMITS = {
    "read_bandwidth": lambda: timing.read_bandwidth(4 << 30),
    "matmul_rate": lambda: timing.matmul_rate(8192),
}


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
        flags.DEFINE_enum(
            "command_buffers",
            "loop",
            program.COMMAND_BUFFERS,
            "What CUDA graphs hold; 'off' times without them.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
        flags.DEFINE_boolean("write_tuned", False, "Tune tiles and write them.", flag_values=values)
        flags.DEFINE_float("tune_minutes", 30.0, "Try no tiles after that.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints the table."""
    gpu = _gpu()
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    requests = list(_requests(values, gpu))
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if output is not None:
            records.append_rows(output, [row])

    limits = _limits()
    keep({"record": "device", **limits, "environment": environment.record()})
    measured = {name: value for name, value in limits.items() if isinstance(value, float)}
    print(f"{gpu.kind}:", ", ".join(f"{name} {value:.3g}/s" for name, value in limits.items()))
    lost = None
    for request in tqdm(requests, unit="kernel", disable=None):
        row = _facts(request, values.dtype)
        if lost is None:
            row |= attempt(lambda request=request: measure(request.make(), measured, values))
            if "error" in row and not timing.device_answers():
                lost = f"{request.op} {request.shape}, {request.rows} rows"
                row["device_lost"] = True
        else:
            row["error"] = f"not run: the device was lost in {lost}"
        keep(row)
    print_table(rows[1:])
    if values.write_tuned:
        _tune(values, gpu)


def _gpu() -> device.Gpu:
    gpu = device.current()
    if gpu is None or jax.default_backend() != "gpu":
        raise ConfigError(
            f"bench_kernel needs an NVIDIA GPU that Mosaic supports; JAX has {jax.devices()[0].device_kind}. "
            "Without one, experiments.aot_compile tells what the kernels take"
        )
    return gpu


def _requests(values: flags.FlagValues, gpu: device.Gpu):
    return kernel_jobs.requests(
        *(values.ops, values.shapes, _whole_numbers(values.m), _whole_numbers(values.contexts)),
        *(values.dtype, gpu.arch),
    )


def _whole_numbers(values: list[str]) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError:
        raise ConfigError("--m and --contexts: expected lists of whole numbers") from None


def _tune(values: flags.FlagValues, gpu: device.Gpu) -> None:
    written = kernel_tuning.write_tuned(
        *(values.ops, values.shapes, _whole_numbers(values.m), values.dtype, gpu),
        seconds=values.tune_minutes * 60,
    )
    for path, names in written.items():
        print(f"tuned tiles of {', '.join(names)} -> {path}")


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns; where it raises, the error as a row: one kernel must not end the run of the others."""
    try:
        return work()
    except Exception as error:  # whatever lowering, a compiler or a launch raises is the result
        text = " ".join(str(error).split())[:500]
        return {"error": f"{type(error).__name__}: {text}"}


def _limits() -> dict[str, float | str]:
    """Bytes and operations per second that this device reaches, or why they are not known."""
    found = {}
    for name, measured in _LIMITS.items():
        tried = attempt(lambda measured=measured: {"value": float(measured())})
        found[name] = tried.get("value", tried.get("error"))
    return found


def _facts(request: Request, dtype: str) -> dict[str, Any]:
    facts = {"op": request.op, "shape": request.shape, "rows": request.rows, "dtype": dtype}
    return {"record": "kernel", **facts}


def measure(job: Job, limits: dict[str, float], values: flags.FlagValues) -> dict[str, Any]:
    """Correctness and times of a job; times are left out where they cannot be had."""
    x, weights = job.draw_x(1), job.rotated_weights()
    got = np.asarray(jax.jit(job.kernel)(x, *weights[0]), np.float64)
    wanted = np.asarray(jax.jit(job.reference)(x, *weights[0]), np.float64)
    error = float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))
    row = {
        "relative_error": error if math.isfinite(error) else None,
        "correct": error <= _TOLERANCE[values.dtype],
        "bytes": job.num_bytes,
        "flops": job.flops,
    }
    timed = attempt(lambda: _times(job, x, weights, limits, values))
    return row | timed


def _times(job: Job, x, weights, limits, values: flags.FlagValues) -> dict[str, Any]:
    buffers = values.command_buffers
    times = timing.seconds_per_call(job.kernel, x, weights, command_buffers=buffers)
    seconds = float(np.median(times))
    row = {
        "us": seconds * 1e6,
        "us_quartiles": [float(q) * 1e6 for q in np.percentile(times, [25, 75])],
    }
    if len(limits) == len(_LIMITS):
        floor = max(job.num_bytes / limits["read_bandwidth"], job.flops / limits["matmul_rate"])
        row["roofline_us"] = floor * 1e6
        row["roofline_share"] = floor / seconds if seconds > 0 else None
    return row | (_peers(job, x, weights, buffers) if values.peers else {})


def _peers(job: Job, x, weights, buffers: str) -> dict[str, float]:
    few = weights[: max(1, len(weights) // 4)]
    times = timing.seconds_per_call(job.reference, x, few, 8, buffers)
    found = {"xla_us": float(np.median(times)) * 1e6}
    if job.shape_nk is not None:
        dense = kernel_jobs.dense_peer(job)
        times = timing.seconds_per_call(
            dense.kernel, dense.draw_x(99), dense.rotated_weights(), command_buffers=buffers
        )
        found["cublas_bf16_us"] = float(np.median(times)) * 1e6
    return found


def print_table(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """Prints kernel rows as a table."""
    table = Table()
    for header in ("op", "shape", "rows", "us", "of roofline", "error", "XLA us", "cuBLAS bf16 us"):
        table.add_column(header, justify="left" if header in ("op", "shape") else "right")
    for row in rows:
        share = row.get("roofline_share")
        table.add_row(
            *(row["op"], row["shape"], str(row["rows"]), _number(row, "us")),
            "-" if share is None else f"{share:.0%}",
            _verdict(row),
            *(_number(row, name) for name in ("xla_us", "cublas_bf16_us")),
        )
    contest.show(table, console)


def _number(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if name in row else "-"


def _verdict(row: dict[str, Any]) -> str:
    if "correct" not in row:
        return row["error"][:60]
    error = row["relative_error"]
    figure = "not finite" if error is None else f"{error:.1e}"
    failed = f" {row['error'][:60]}" if "error" in row else ""
    return figure + ("" if row["correct"] else " WRONG") + failed


if __name__ == "__main__":
    common.run(define_flags, main)
