"""How fast are the kernels on this GPU? Against the roofline measured in the same run, and against XLA's own.

    python -m experiments.bench_kernel --ops=matmul_w4a16,tree_attention --shapes=llama3-8b,llama3-70b \\
        --m=1,8,16,32,64 --output=results.jsonl
    python -m experiments.bench_kernel --ops=matmul_w4a16 --write_tuned --output=results.jsonl

First the device's read bandwidth and bfloat16 matmul rate. Then per op, shape and number of rows: correctness on
fresh random inputs, RMS(error) / RMS(reference), and the median time over rotated weights that no cache holds; beside
it cuBLAS in bfloat16 on a weight of that shape, and XLA's dequantize-and-dot. --output gets one row each, appended as
known. Kernels run in a process of their own: one that fails, hangs for --kernel_seconds or takes the process down gets
a row with its error, and the others go on. --write_tuned tries tiles, in that process too, for --tune_minutes, and
writes the fastest to --tuned_dir. Needs an NVIDIA GPU.
"""

import collections
import contextlib
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments.shared import (
    common,
    contest,
    flag_groups,
    kernel_jobs,
    kernel_server,
    kernel_tuning,
    records,
)
from experiments.shared.kernel_jobs import Request
from specjax.doctor import workers
from specjax.engine import program
from specjax.errors import ConfigError
from specjax.pallas import device

OPS = kernel_jobs.OPS
# Hangs and ends of the process after which an op has no further rows: each may cost --kernel_seconds.
_MOST_LOSSES = 2


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_list("ops", list(OPS), "Kernels to time.", flag_values=values)
        flags.DEFINE_list(
            "shapes", ["llama3-8b"], "Models whose shapes to use.", flag_values=values
        )
        flags.DEFINE_list("m", ["1", "8", "16", "32", "64"], "Rows.", flag_values=values)
        flags.DEFINE_list("contexts", ["1024", "4096"], "Cache lengths.", flag_values=values)
        flags.DEFINE_enum(
            *("dtype", "float16", list(kernel_server.TOLERANCE), "Float inputs."),
            flag_values=values,
        )
        flags.DEFINE_boolean("times", True, "Time, not only compare.", flag_values=values)
        flags.DEFINE_boolean("peers", True, "Time XLA's own matmuls too.", flag_values=values)
        flags.DEFINE_enum(
            "command_buffers",
            "loop",
            program.COMMAND_BUFFERS,
            "What CUDA graphs hold; 'off' times without them.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "kernels",
            None,
            "MODULE:FUNCTION whose results stand in for kernels; no GPU is needed then.",
            flag_values=values,
        )
        _define_limits(values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
        flags.DEFINE_boolean("write_tuned", False, "Tune tiles and write them.", flag_values=values)
        flags.DEFINE_string(
            *("tuned_dir", None, "Where to. Default: specjax/pallas/tuned."), flag_values=values
        )
        flags.DEFINE_float("tune_minutes", 30.0, "Try no tiles after that.", flag_values=values)


def _define_limits(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean(
        *("processes", True, "Run kernels in a process that may hang or die."), flag_values=values
    )
    flags.DEFINE_float(
        *("kernel_seconds", 120.0, "For one kernel, then its process is ended."),
        lower_bound=0.1,
        flag_values=values,
    )
    flags.DEFINE_float(*("total_seconds", None, "Begin no kernel after that."), flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints the table."""
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    with contextlib.closing(_worker(values)) as worker:
        _run(values, worker, output)


def _worker(values: flags.FlagValues) -> workers.Worker | kernel_server.Local:
    names = ("dtype", "command_buffers", "times", "peers", "kernels")
    settings = {name: values[name].value for name in names}
    if not values.processes:
        return kernel_server.Local(kernel_server.Server(**settings))
    return workers.Worker(kernel_server.ENTRY, settings)


def _run(values: flags.FlagValues, worker, output) -> None:
    found = _asked(worker, {"device": True}, values.kernel_seconds)
    gpu = kernel_server.gpu_of(found)
    requests = list(_requests(values))
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if output is not None:
            records.append_rows(output, [row])

    limits = _asked(worker, {"limits": True}, values.kernel_seconds) if values.times else {}
    keep({"record": "device", **limits, "environment": found["environment"]})
    measured = {name: value for name, value in limits.items() if isinstance(value, float)}
    print(f"{gpu.kind}:", ", ".join(f"{name} {value:.3g}/s" for name, value in measured.items()))
    clock = kernel_tuning.Clock(values.total_seconds)
    lost, losses = None, collections.Counter()
    for request in tqdm(requests, unit="kernel", disable=None):
        row = {"record": "kernel", **_facts(request), "shape": request.label, "dtype": values.dtype}
        if lost is not None:
            keep(row | {"error": f"not run: the device was lost in {lost}"})
        elif clock.up:
            keep(row | {"error": f"not run: {values.total_seconds:g} s were up"})
        elif losses[request.op] >= _MOST_LOSSES:
            keep(row | {"error": f"not run: {request.op} hung or died {_MOST_LOSSES} times"})
        else:
            question = _facts(request) | {"context": request.context, "limits": measured}
            row |= _asked(worker, question, clock.at_most(values.kernel_seconds))
            losses[request.op] += row.pop("process_lost", False)
            if row.get("error") and values.processes:
                worker.close()  # after a fault nothing runs in that process; the next one is sound
            elif row.get("device_lost"):
                lost = f"{request.op} {request.label}, {request.rows} rows"
            keep(row)
    print_table(rows[1:])
    if values.write_tuned:
        _tune(values, gpu, worker)


def _asked(worker, question: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The answer; a hang or the end of the process as an error."""
    try:
        return worker.ask(question, seconds)
    except workers.Lost as error:
        tail = " ".join(error.last_lines.split())[-300:]
        return {"error": f"{error}: {tail}" if tail else str(error), "process_lost": True}


def _requests(values: flags.FlagValues):
    return kernel_jobs.requests(
        *(values.ops, values.shapes, _whole_numbers(values.m), _whole_numbers(values.contexts))
    )


def _whole_numbers(values: list[str]) -> list[int]:
    try:
        return [int(value) for value in values]
    except ValueError:
        raise ConfigError("--m and --contexts: expected lists of whole numbers") from None


def _tune(values: flags.FlagValues, gpu: device.Gpu, worker) -> None:
    written = kernel_tuning.write_tuned(
        *(values.ops, values.shapes, _whole_numbers(values.m), gpu, worker),
        seconds=values.tune_minutes * 60,
        kernel_seconds=values.kernel_seconds,
        folder=values.tuned_dir,
    )
    for path, names in written.items():
        print(f"tuned tiles of {', '.join(names)} -> {path}")


def _facts(request: Request) -> dict[str, Any]:
    return {"op": request.op, "shape": request.shape, "rows": request.rows}


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
