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
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

import specjax
from experiments.shared import (
    common,
    contest,
    environment,
    flag_groups,
    flags_doctor,
    flags_model,
    flags_sampling,
    prompt_files,
    records,
    tables,
    traces,
)
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


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_sampling.define(values)
    flags_model.define(values)
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
    with flag_groups.heading(values, "Drafter"):
        flags.DEFINE_string(
            "draft_model", None, "Draft model; default: --model.", flag_values=values
        )
        flags.DEFINE_integer(
            "draft_depth", 4, "Drafted tokens per step.", lower_bound=1, flag_values=values
        )
    with flag_groups.heading(values, "Quantization"):
        for role, default in (("draft", "fp8"), ("verify", "int8")):
            flags.DEFINE_string(
                f"{role}_quantization",
                default,
                f"One of {', '.join(QUANTIZATIONS)}, or a scheme.",
                flag_values=values,
            )
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_integer("repeats", 5, "Counted rounds.", lower_bound=1, flag_values=values)
        flags.DEFINE_boolean(
            "trace", False, "Print every step of the first prompt.", flag_values=values
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; rows are appended.", flag_values=values)
    flags.mark_flag_as_required("prompts_file", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures, writes, prints the table."""
    if values.scheme is not None:
        raise ConfigError("--scheme: use --verify_quantization here")
    quantizations = {role: scheme_of(values, role) for role in ("draft", "verify")}
    prompts = prompt_files.read_prompts(values.prompts_file)
    output = None if values.output is None else records.check_output(values.output, ".jsonl")
    methods = build(values, quantizations)
    target = methods[0].model
    encoded = prompt_files.encode(target, prompts, values.prompts_file, values.max_length)
    options = flags_sampling.options(values)
    with flags_model.profiled(values):
        contest.measure(methods, encoded, values.repeats, options)
    summaries = [summarize(method, methods[0]) for method in methods]
    print_table(summaries)
    for line in ratios(summaries):
        print(line)
    if values.trace:
        qspec = methods[3]
        traces.print_trace(qspec.model, qspec.drafter, encoded[0], options)
    if output is not None:
        config = _config(values, quantizations, target)
        ids = [prompt["id"] for prompt in prompts]
        rows = [row for method in methods for row in contest.run_rows(method, ids)] + summaries
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


def build(
    values: flags.FlagValues, quantizations: dict[str, str | None]
) -> list[contest.Contestant]:
    """Loads the models; the draft is loaded once as it is stored and once quantized."""
    draft_model = values.draft_model or values.model
    target = flags_model.load_model(values, quantize=quantizations["verify"])
    draft = specjax.load(
        draft_model,
        dtype=target.dtype_name,
        quantize=quantizations["draft"],
        backend=flags_doctor.choice(values)[0],
        dequantize=values.dequantize,
    )
    spec = {"kind": "lm", "model": draft_model, "draft_depth": values.draft_depth}
    quantized = spec | {"quantize": quantizations["draft"]}
    drafters = {
        "target": (target, "none"),
        "draft": (draft, "none"),
        "speculative": (target, spec),
        "qspec": (target, quantized),
    }
    return [
        contest.Contestant(
            name=name, facts={"method": name}, model=model, drafter=model.drafter(drafter)
        )
        for name, (model, drafter) in drafters.items()
    ]


def summarize(method: contest.Contestant, target: contest.Contestant) -> dict[str, Any]:
    """The summary with `system_efficiency`: emitted tokens over the most that the steps could have emitted."""
    summary = contest.summarize(method, target, "target")
    most = summary["num_spec_steps"] * (method.drafter.max_depth + 1)
    emitted = summary["num_spec_steps"] + summary["num_accepted_draft_tokens"]
    return summary | {"system_efficiency": emitted / most if most else None}


def print_table(summaries: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Prints summaries as a table."""
    table = Table("method")
    for header in (*contest.SPEED_HEADERS, "acceptance rate", "efficiency", "equals target"):
        table.add_column(header, justify="right")
    for row in summaries:
        table.add_row(
            row["method"] + ("" if row["lossless"] else " (lossy)"),
            *contest.speed_cells(row),
            tables.number(row["draft_acceptance_rate"], ".3f"),
            tables.number(row["system_efficiency"], ".3f"),
            contest.equal_cell(row, "target"),
        )
    contest.show(table, console)


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
        **flags_model.model_config(values),
        "dtype": model.dtype_name,
        "draft_model": values.draft_model or values.model,
        "draft_quantization": values.draft_quantization,
        "verify_quantization": values.verify_quantization,
        "schemes": quantizations,
        "draft_depth": values.draft_depth,
        "backend": values.backend,
        "dequantize": values.dequantize,
        **flags_sampling.options(values),
        "prompts_file": Path(values.prompts_file).name,
        "repeats": values.repeats,
        "environment": environment.record(),
    }


if __name__ == "__main__":
    common.run(define_flags, main)
