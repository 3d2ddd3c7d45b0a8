"""Runs a benchmark with any combination of model, scheme and drafter; answers go to JSON lines.

    python -m experiments.evaluate --benchmark=mt_bench --data_dir=DIR --model=smollm2-135m --drafter=ngram --output=DIR
    python -m experiments.evaluate --preset=smollm2-gsm8k-ngram --data_dir=DIR --output=DIR

--data_dir holds mt_bench/question.jsonl, spec_bench/question.jsonl, gsm8k/ (parquet, or test.jsonl) and
human_eval/HumanEval.jsonl.gz; it is only read. Answers are appended to OUTPUT/<benchmark>/<run name>.jsonl, one row per
question with the fields of FastChat's and SpecMQuant's answer files, the metrics of every turn, the score where the
benchmark has one, and the whole configuration. The same command continues an interrupted run; a larger --limit
continues a smaller one. `experiments.report` turns the files into tables and figures, `experiments.rescore` scores
them again.

--max_new_tokens defaults to what the reference uses (1024; GSM8K 256, HumanEval 512).

`wall_time` is decoding time without prompts and compilation. `accept_lengths` counts the tokens of every target step
(bonus included, before an answer is cut at its end), per turn in ascending order, or in order of time with --trace,
which records every step and slows decoding a little. `generate_speed` counts the token that the prompt's pass yields,
as the reference does.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import benchmarks
from experiments.benchmarks import Benchmark, Question
from experiments.shared import (
    answering,
    answers,
    common,
    environment,
    flag_groups,
    flags_drafter,
    flags_model,
    flags_sampling,
    methods,
    naming,
    preset,
    records,
)
from specjax.errors import ConfigError

_FINGERPRINT = (
    *("benchmark", "model", "drafter", "dtype", "scheme", "qserve_layernorm", "depth", "seed"),
    *("max_new_tokens", "max_length", "temperature", "top_k", "top_p", "stop", "acceptance"),
    "ignore_eos",
)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    preset.define_flags(values)
    flags_sampling.define(values, max_new_tokens=None)
    flags_model.define(values, required=False)
    flags_drafter.define(values)
    string, integer, boolean = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    names = ", ".join(benchmarks.BENCHMARKS)
    described = "questions, evenly over the categories. Default: all."
    with flag_groups.heading(values, "Input"):
        string("benchmark", None, f"One of: {names}.", flag_values=values)
        string("data_dir", None, "Directory of the benchmarks' data.", flag_values=values)
        integer("limit", None, f"At most so many {described}", lower_bound=1, flag_values=values)
        integer(
            "limit_per_category",
            None,
            "At most so many of each.",
            lower_bound=1,
            flag_values=values,
        )
    with flag_groups.heading(values, "Measuring"):
        integer("warmup", 1, "Answers that are not counted.", lower_bound=0, flag_values=values)
        boolean(
            "draft_prefill_sep",
            False,
            "Tell the drafter's share of the prompts' time, by a second pass without it: draft_prefill_latency.",
            flag_values=values,
        )
        boolean(
            "trace", False, "Keep accept_lengths in the order of the steps.", flag_values=values
        )
    with flag_groups.heading(values, "Output"):
        string("output", None, "Directory for answer files.", flag_values=values)
        string(
            "run_name",
            None,
            "Name of the answer file and of the run in reports. Default: model, weights and drafter.",
            flag_values=values,
        )
        boolean("overwrite", False, "Start the answer file anew.", flag_values=values)
    with flag_groups.heading(values, "Execution"):
        boolean(
            "allow_code_execution",
            False,
            "HumanEval: run what the model wrote, with your permissions, in a process with limited time and memory.",
            flag_values=values,
        )


def main(values: flags.FlagValues) -> None:
    """Checks everything that can be checked without the model, loads it, answers."""
    preset.apply(values)
    for name in ("benchmark", "data_dir", "output"):
        if values[name].value is None:
            raise ConfigError(f"--{name} is needed")
    benchmark = benchmarks.lookup(values.benchmark)
    questions = benchmark.load(Path(values.data_dir))
    chosen = choose(questions, values.limit, values.limit_per_category)
    spec = flags_drafter.spec(values)
    config = _config(values, benchmark, spec)
    path = Path(values.output) / benchmark.name / f"{config['run_name']}.jsonl"
    output = records.Records(path, values.overwrite)
    # An unset --dtype is known only when the model is loaded.
    unknown = {"dtype"} if values.dtype is None else set()
    output.check_config(config, [name for name in _FINGERPRINT if name not in unknown])
    model = flags_model.load_model(values, [spec])
    config["dtype"] = model.dtype_name
    config["fingerprint"] = records.fingerprint(config, _FINGERPRINT)
    output.check_config(config, _FINGERPRINT)
    todo = _remaining(output, chosen)
    options = _options(values, benchmark) | {"trace": values.trace}
    run = answering.Run(
        model,
        model.drafter(spec),
        benchmark,
        questions,
        options,
        config,
        values.allow_code_execution,
        values.draft_prefill_sep and spec["kind"] != "none",
    )
    with flags_model.profiled(values), output:
        if todo:
            run.warm_up(todo[0], values.warmup)
        else:
            output.repair()
        run.answer_all(todo, len(chosen), output)
    wanted = {question.question_id for question in chosen}
    print(summary([row for row in output.rows if row["id"] in wanted]))
    print(f"-> {path}")
    if benchmark.executes_code and not values.allow_code_execution:
        print("nothing was executed: experiments.rescore --allow_code_execution scores the file")


def choose(
    questions: Sequence[Question], limit: int | None, limit_per_category: int | None
) -> list[Question]:
    """The questions to answer: as many of each category as the limits allow, in the order of the data."""
    ranks: dict[str, int] = {}
    ranked = []
    for number, question in enumerate(questions):
        rank = ranks[question.category] = ranks.get(question.category, -1) + 1
        if limit_per_category is None or rank < limit_per_category:
            ranked.append((rank, number))
    kept = sorted(number for _, number in sorted(ranked)[:limit])
    return [questions[number] for number in kept]


def _config(values: flags.FlagValues, benchmark: Benchmark, spec: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides how answers come about; `_FINGERPRINT` names what decides their tokens."""
    weights = describe_weights(values.model)
    if values.scheme is not None:
        weights += f" as {values.scheme}"
    options = _options(values, benchmark)
    name = values.run_name or _run_name(values, weights, spec)
    if not re.fullmatch(r"[\w.()=,+-]+", name):
        raise ConfigError(
            f"--run_name={name!r}: letters, digits and ._-+=(), only; it names a file"
        )
    return {
        "benchmark": benchmark.name,
        "run_name": name,
        **flags_model.model_config(values),
        "weights": weights,
        "drafter": naming.full_spec(spec),
        "drafter_label": naming.short_label(spec),
        **options,
        "preset": values.preset,
        "backend": values.backend,
        "dequantize": flags_model.dequantize(values, [spec]),
        "environment": environment.record(),
    }


def _options(values: flags.FlagValues, benchmark: Benchmark) -> dict[str, Any]:
    """Options of `LanguageModel.generate`: the flags, with the benchmark's rules."""
    options = flags_sampling.options(values)
    if options["max_new_tokens"] is None:
        options["max_new_tokens"] = benchmark.max_new_tokens
    options["stop"] = (*benchmark.stop, *options["stop"])
    options["ignore_eos"] = options["ignore_eos"] or benchmark.ignore_eos
    return options


def describe_weights(model: str) -> str:
    """How a checkpoint stores its weights, e.g. "dense" or "w4a16 g128", by the first linear of its first layer."""
    linear = methods.first_linear(model)
    if linear is None:
        return "dense"
    whole = linear.group_size == linear.in_features
    return linear.scheme.name + ("" if whole else f" g{linear.group_size}")


def _run_name(values: flags.FlagValues, weights: str, spec: dict[str, Any]) -> str:
    """A file name that tells model, weights, depth and drafter."""
    parts = [Path(values.model).name.removesuffix(".gguf"), weights, naming.short_label(spec)]
    parts += [values.depth] if values.depth != "auto" else []
    parts += [values.tree_selection] if values.tree_selection != "off" else []
    return "_".join(re.sub(r"[^\w.=,+-]+", "-", part).strip("-") for part in parts)


def _remaining(output: records.Records, chosen: Sequence[Question]) -> list[Question]:
    """Questions without an answer; refuses answers to other questions under the same id."""
    done = {row["id"]: row.get("question_digest") for row in output.rows}
    for question in chosen:
        if done.get(question.question_id, answering.digest(question)) != answering.digest(question):
            raise ConfigError(
                f"{output.path}: row {question.question_id!r} answers another question; pass --overwrite to start "
                "anew, or another --output"
            )
    return [question for question in chosen if question.question_id not in done]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line about answered questions."""
    good = answers.answered(rows)
    parts = [f"{len(rows)} questions"]
    if len(good) < len(rows):
        parts.append(f"{len(rows) - len(good)} without a timed answer (see 'error')")
    if good:
        parts.append(f"{answers.mean_speed(good):.1f} tokens/s")
    if answers.mean_accepted(good) is not None:
        parts.append(f"acceptance length {answers.mean_accepted(good):.2f}")
    scored = answers.accuracy(good)
    if scored is not None:
        parts.append(f"{scored[0]} of {scored[1]} correct")
    return ", ".join(parts)


if __name__ == "__main__":
    common.run(define_flags, main)
