"""Compiles for a GPU that is not there, on a machine with CPUs only, and reports what the compiler made.

    make aot    # once: a virtual environment with JAX's CUDA plugin, .venv-aot
    .venv-aot/bin/python -m experiments.aot_compile --target=h200 --model_shape=llama3-8b --scheme=w4a16 \\
        --drafter=eagle --output=DIR
    .venv-aot/bin/python -m experiments.aot_compile --target=h200,a100 --kernels_only --output=DIR

With --kernels_only: registers, spills, shared memory and instructions of every kernel, and status 1 where one spills,
has no matrix instruction or takes more shared memory than the device has. Without: the whole decoding program of a
model of that shape; its memory, its launches by layer and step, copies, command buffers, and an executable that a
machine with that GPU and the same versions of JAX can load (`specjax.aot.executable.load`).
DIR/report.jsonl has a row per kernel or program, DIR/report.md the tables.
"""

import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags

from experiments.shared import common, flag_groups, flags_drafter, records
from specjax.aot import compile as aot
from specjax.aot import kernels, report, shapes, topology
from specjax.errors import ConfigError


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_drafter.define(values)
    with flag_groups.heading(values, "Model"):
        flags.DEFINE_list(
            "model_shape", ["llama3-8b"], f"Of {', '.join(shapes.CONFIGS)}.", flag_values=values
        )
        flags.DEFINE_string("scheme", "w4a16", "Of the weights, or dense.", flag_values=values)
        flags.DEFINE_integer("group_size", 128, "-1: per channel.", flag_values=values)
        flags.DEFINE_enum(
            "dtype", "bfloat16", ("bfloat16", "float16"), "Compute dtype.", flag_values=values
        )
        flags.DEFINE_integer(
            "num_layers", None, "Compile this many layers only.", lower_bound=1, flag_values=values
        )
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_boolean("kernels_only", False, "Kernels, no program.", flag_values=values)
        flags.DEFINE_list("ops", list(kernels.OPS), "Kernels to compile.", flag_values=values)
        flags.DEFINE_string(
            "only",
            "",
            "Matmuls of weights whose name begins so, e.g. llama3-8b/o.",
            flag_values=values,
        )
        flags.DEFINE_list("m", ["1", "16", "64"], "Rows: tokens or nodes.", flag_values=values)
        flags.DEFINE_integer(
            "context",
            1024,
            "Tokens in the cache, for the estimate.",
            lower_bound=0,
            flag_values=values,
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "Folder for reports and dumps.", flag_values=values)
    with flag_groups.heading(values, "Execution"):
        flags.DEFINE_list(
            "target", ["h200"], f"Of {', '.join(topology.TARGETS)}.", flag_values=values
        )
        flags.DEFINE_enum(
            "backend", "auto", ("auto", "xla", "mosaic"), "Kernels.", flag_values=values
        )
        flags.DEFINE_integer("batch_size", 1, "Sequences.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("capacity", 4096, "Cache slots.", lower_bound=16, flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Compiles, writes and prints the report."""
    for target in values.target:
        topology.lookup(target)
    for shape in values.model_shape:
        shapes.lookup(shape)
    output = Path(values.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = _kernels(values, output) if values.kernels_only else _programs(values, output)
    records.append_rows(output / "report.jsonl", rows)
    text = _report(values, rows)
    (output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    bad = [row for row in rows if row.get("error") or row.get("problems")]
    if bad:
        print(f"error: {len(bad)} of {len(rows)} are not as they should be", file=sys.stderr)
        sys.exit(1)


def _report(values: flags.FlagValues, rows: list[dict[str, Any]]) -> str:
    if values.kernels_only:
        return f"{report.kernel_summary(rows)}\n{report.kernel_table(rows)}"
    return report.program_table(rows)


def _kernels(values: flags.FlagValues, output: Path) -> list[dict[str, Any]]:
    if not all(size.isdecimal() for size in values.m):
        raise ConfigError(f"--m={','.join(values.m)}: expected whole numbers")
    arguments = {
        "ops": values.ops,
        "models": values.model_shape,
        "rows": [int(size) for size in values.m],
        "dtype": values.dtype,
        "only": values.only,
    }

    def run(target: str) -> list[dict[str, Any]]:
        folder = output / target
        return aot.in_process(
            "specjax.aot.kernels:run", target, folder, arguments, dump_kernels=True
        )

    # A process for each target; more than there are processors would only take turns.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [row for rows in pool.map(run, values.target) for row in rows]


def _programs(values: flags.FlagValues, output: Path) -> list[dict[str, Any]]:
    arguments = {
        "drafter": flags_drafter.spec(values),
        **{name: values[name].value for name in ("scheme", "group_size", "dtype", "backend")},
        **{name: values[name].value for name in ("capacity", "context")},
        "batch": values.batch_size,
        "num_layers": values.num_layers,
    }
    rows = []
    for target, shape in itertools.product(values.target, values.model_shape):
        folder = output / target / shape
        job = arguments | {"model_shape": shape}
        rows.append(aot.in_process("specjax.aot.programs:run", target, folder, job))
    return rows


if __name__ == "__main__":
    common.run(define_flags, main)
