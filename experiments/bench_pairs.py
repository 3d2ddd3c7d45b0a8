"""Two models of one tokenizer, each under its own quantization: alone, and one drafting for the other.

    python -m experiments.bench_pairs --model=DIR --draft_model=DIR --prompts_file=prompts.jsonl \\
        --draft_quantization=fp8 --verify_quantization=int8 --draft_depth=4 --repeats=5 --output=results.jsonl

Methods:
    target       plain decoding of --model under --verify_quantization
    draft        plain decoding of --draft_model under --draft_quantization
    speculative  the target, with the draft model as it is stored
    qspec        the target, with the draft model under --draft_quantization
All but `draft` produce the target's output. Without --draft_model the target drafts for itself.

Quantizations round the (decoded) weights to nearest while loading: `none`, `int8` and `int4` (weights), `fp8` and `fp4`
(weights and activations), or the name of a scheme such as w8a8. Methods take turns on every group of --batch_size
prompts; loading and compilation are not counted. --output receives one row per method and repeat and one summary per
method. --trace prints, for the first prompt, every drafted token that qspec accepted or replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import specjax
from experiments import bench_decode, common, environment, records, tables, traces
from specjax.errors import ConfigError
from specjax.quant import scheme as schemes

QUANTIZATIONS = {
    "none": None,
    "int8": "w8a16",
    "int4": "w4a16",
    "fp8": "fp8",
    "fp4": "fp4-a4",
}
_RATIOS = (("qspec", "target"), ("speculative", "target"), ("qspec", "speculative"))


@dataclass(kw_only=True)
class Method:
    """A way of generating, and what was measured of it.

    Attributes:
        name: see the module docstring.
        model: who generates.
        drafter: built for it.
        runs: per repeat the results of every group; the first repeat is the warm-up.
    """

    name: str
    model: specjax.LanguageModel
    drafter: Any
    runs: list[list[list[specjax.GenerationResult]]] = field(default_factory=list)

    @property
    def outputs(self) -> list[list[int]]:
        """Tokens of every prompt, of the warm-up."""
        return [result.output_ids for group in self.runs[0] for result in group]


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    common.define_model_flags(values)
    common.define_sampling_flags(values)
    flags.DEFINE_string("draft_model", None, "Draft model; default: --model.", flag_values=values)
    for role, default in (("draft", "fp8"), ("verify", "int8")):
        flags.DEFINE_string(
            f"{role}_quantization",
            default,
            f"One of {', '.join(QUANTIZATIONS)}, or a scheme.",
            flag_values=values,
        )
    flags.DEFINE_integer(
        "draft_depth", 4, "Drafted tokens per step.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
    flags.mark_flag_as_required("prompts_file", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "Counted rounds.", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean(
        "trace", False, "Print every step of the first prompt.", flag_values=values
    )
    flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints the table."""
    if values.scheme is not None:
        raise ConfigError("--scheme: use --verify_quantization here")
    quantizations = {role: scheme_of(values, role) for role in ("draft", "verify")}
    prompts = records.read_prompts(values.prompts_file)
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    methods = build(values, quantizations)
    target = methods[0].model
    encoded = records.encode(target, prompts, values.prompts_file, values.max_length)
    options = common.options(values)
    with common.profiled(values):
        measure(methods, encoded, values.repeats, options)
    summaries = [summarize(method, methods[0]) for method in methods]
    print_table(summaries)
    for line in ratios(summaries):
        print(line)
    if values.trace:
        qspec = methods[3]
        traces.print_trace(qspec.model, qspec.drafter, encoded[0], options)
    if output is not None:
        config = _config(values, quantizations, target)
        rows = [row for method in methods for row in run_rows(method)] + summaries
        records.append_rows(output, [row | {"config": config} for row in rows])
        print(f"{len(rows)} rows -> {output}")


def scheme_of(values: flags.FlagValues, role: str) -> str | None:
    """The scheme that a quantization flag stands for; None for none.

    Raises:
        ConfigError: there is no such quantization.
    """
    name = values[f"{role}_quantization"].value
    if name in QUANTIZATIONS:
        return QUANTIZATIONS[name]
    if name not in schemes.SCHEMES:
        raise ConfigError(
            f"--{role}_quantization={name!r}: supported are {', '.join(QUANTIZATIONS)}, and the schemes "
            f"{', '.join(schemes.SCHEMES)}"
        )
    return name


def build(values: flags.FlagValues, quantizations: dict[str, str | None]) -> list[Method]:
    """Loads the models; the draft is loaded once as it is stored and once quantized."""
    draft_model = values.draft_model or values.model
    target = common.load_model(values, quantize=quantizations["verify"])
    draft = specjax.load(
        draft_model,
        dtype=target.dtype_name,
        quantize=quantizations["draft"],
        backend=values.backend,
        dequantize=values.dequantize,
    )
    spec = {"kind": "lm", "model": draft_model, "draft_depth": values.draft_depth}
    return [
        Method(name="target", model=target, drafter=target.drafter("none")),
        Method(name="draft", model=draft, drafter=draft.drafter("none")),
        Method(name="speculative", model=target, drafter=target.drafter(spec)),
        Method(
            name="qspec",
            model=target,
            drafter=target.drafter(spec | {"quantize": quantizations["draft"]}),
        ),
    ]


def measure(
    methods: Sequence[Method],
    prompts: Sequence[list[int]],
    repeats: int,
    options: dict[str, Any],
) -> None:
    """Fills in the runs: a warm-up and `repeats` counted rounds over all prompts, the methods taking turns."""
    size = options["batch_size"]
    starts = range(0, len(prompts), size)
    with tqdm(total=(repeats + 1) * len(starts) * len(methods), unit="run", disable=None) as bar:
        for repeat in range(repeats + 1):
            for method in methods:
                method.runs.append([])
            for start in starts:
                shift = repeat % len(methods)
                for method in [*methods[shift:], *methods[:shift]]:
                    bar.set_postfix_str(("warm-up " if repeat == 0 else "") + method.name)
                    group = prompts[start : start + size]
                    numbers = range(start, start + len(group))
                    results = method.model.generate_iter(
                        group, method.drafter, request_ids=numbers, **options
                    )
                    ordered = sorted(results, key=lambda pair: pair[0])
                    method.runs[-1].append([result for _, result in ordered])
                    bar.update()


def run_rows(method: Method) -> list[dict[str, Any]]:
    """One row per counted round."""
    return [
        {
            "record": "run",
            "method": method.name,
            "repeat": repeat,
            **bench_decode.total_metrics(groups),
        }
        for repeat, groups in enumerate(method.runs[1:])
    ]


def summarize(method: Method, target: Method) -> dict[str, Any]:
    """Medians over the counted rounds; the speed-up is the median of the rounds' own ratios to the target alone.

    `system_efficiency` is emitted tokens over the most that the steps could have emitted.
    """
    rounds = [bench_decode.total_metrics(groups) for groups in method.runs[1:]]
    base = [bench_decode.total_metrics(groups)["tokens_per_s"] for groups in target.runs[1:]]
    rates = [metrics["tokens_per_s"] for metrics in rounds]
    known = None not in rates and None not in base
    most = rounds[0]["num_spec_steps"] * (method.drafter.max_depth + 1)
    emitted = rounds[0]["num_spec_steps"] + rounds[0]["num_accepted_draft_tokens"]
    return {
        **rounds[0],
        "record": "summary",
        "method": method.name,
        "repeats": len(rounds),
        "tokens_per_s": float(np.median(rates)) if known else None,
        "tokens_per_s_quartiles": np.percentile(rates, [25, 75]).tolist() if known else None,
        "speedup": float(np.median(np.divide(rates, base))) if known else None,
        "system_efficiency": emitted / most if most else None,
        "num_prompts": len(method.outputs),
        "outputs_equal_to_target": sum(
            mine == theirs for mine, theirs in zip(method.outputs, target.outputs, strict=True)
        ),
    }


def print_table(summaries: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints summaries as a table."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    table = Table("method")
    headers = ("tokens/s", "quartiles", "speed-up", "acceptance length", "acceptance rate")
    for header in (*headers, "efficiency", "equals target"):
        table.add_column(header, justify="right")
    for row in summaries:
        quartiles = row["tokens_per_s_quartiles"]
        equal, count = row["outputs_equal_to_target"], row["num_prompts"]
        table.add_row(
            row["method"] + ("" if row["lossless"] else " (lossy)"),
            tables.number(row["tokens_per_s"], ".1f"),
            "-" if quartiles is None else f"{quartiles[0]:.1f} - {quartiles[1]:.1f}",
            tables.number(row["speedup"], ".2f"),
            tables.number(row["mean_acceptance_length"], ".2f"),
            tables.number(row["draft_acceptance_rate"], ".3f"),
            tables.number(row["system_efficiency"], ".3f"),
            "yes" if equal == count else f"no ({equal} of {count})",
        )
    console.print(table)


def ratios(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """The speed-ups that the table leaves to the reader."""
    rate = {row["method"]: row["tokens_per_s"] for row in summaries}
    return [
        f"{over} / {under}: {rate[over] / rate[under]:.2f}"
        for over, under in _RATIOS
        if rate[over] and rate[under]
    ]


def _config(
    values: flags.FlagValues, quantizations: dict[str, str | None], model: specjax.LanguageModel
) -> dict[str, Any]:
    return {
        **common.model_config(values),
        "dtype": model.dtype_name,
        "draft_model": values.draft_model or values.model,
        "draft_quantization": values.draft_quantization,
        "verify_quantization": values.verify_quantization,
        "schemes": quantizations,
        "draft_depth": values.draft_depth,
        "backend": values.backend,
        "dequantize": values.dequantize,
        **common.options(values),
        "prompts_file": Path(values.prompts_file).name,
        "repeats": values.repeats,
        "environment": environment.record(),
    }


if __name__ == "__main__":
    common.run(define_flags, main)
