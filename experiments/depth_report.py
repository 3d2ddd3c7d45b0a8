"""What token-adaptive depth buys in a draft tree's pass, and what it costs.

    python -m experiments.depth_report --model=ROUTED --drafter=eagle --draft_checkpoint=HEAD --predictor=PREDICTOR \\
        --reference=BASE --prompts_file=prompts.jsonl --output=depth.jsonl

The routed model decodes the prompts greedily four times: token by token, and with the drafter while all nodes of a tree
("off"), the nodes of the predicted path ("vote") or the survivors ("prune") decide which layers run. Every way gives a
row: layers that ran per pass, bytes of weights that such a pass reads, acceptance length, how many tokens are those of
the routed model token by token, and the memory of the compiled loop. Another row tells the perplexity of the routed
model and of the --reference models on what the first of these writes after the same prompts. Rows that --output holds
already are kept, others are appended, and all of them become a table beside it (.md).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import specjax
from experiments.shared import (
    common,
    environment,
    flag_groups,
    flags_drafter,
    flags_model,
    naming,
    prompt_files,
    records,
    tables,
)
from specjax import scoring
from specjax.errors import ConfigError
from specjax.models import prepare

_PLAIN, _PERPLEXITY = "token by token", "perplexity"
_SELECTIONS = ("off", "vote", "prune")


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_model.define(values)
    flags_drafter.define(values, "eagle")
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
    with flag_groups.heading(values, "Measuring"):
        flags.DEFINE_multi_string(
            "reference",
            [],
            "Models to compare perplexities with; the first writes the text.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "label", None, "The model in tables. Default: --model.", flag_values=values
        )
    with flag_groups.heading(values, "Sampling"):
        flags.DEFINE_integer("max_new_tokens", 96, "Per prompt.", lower_bound=2, flag_values=values)
        flags.DEFINE_boolean("ignore_eos", False, "Go on after stop tokens.", flag_values=values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines; resumes.", flag_values=values)
        flags.DEFINE_boolean("overwrite", False, "Start --output anew.", flag_values=values)
    with flag_groups.heading(values, "Execution"):
        flags.DEFINE_integer(
            "batch_size", 1, "Prompts together.", lower_bound=1, flag_values=values
        )
    flags.mark_flags_as_required(["prompts_file", "output"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Measures what is missing, writes the table."""
    if values.tree_selection != "off":
        raise ConfigError("--tree_selection: all of them are compared; drop it")
    spec = flags_drafter.spec(values)
    output = records.check_output(values.output, ".jsonl")
    prompts = prompt_files.read_prompts(values.prompts_file)
    with records.Records(output, values.overwrite) as results:
        _measure(values, spec, prompts, results)
        table = output.with_suffix(".md")
        with records.atomic(table) as temporary:
            temporary.write_text(markdown(results.rows), encoding="utf-8")
    print(f"{len(results.rows)} rows -> {output}, {table}")


def _measure(values: flags.FlagValues, spec, prompts, results: records.Records) -> None:
    """Appends the rows that are not there yet."""
    label = values.label or values.model
    config = {
        **flags_model.model_config(values),
        "predictor": values.predictor,
        "survivors": values.survivors,
        "drafter": naming.full_spec(spec),
        "reference": list(values.reference),
        "prompts_file": Path(values.prompts_file).name,
        **{name: values[name].value for name in ("max_new_tokens", "batch_size", "ignore_eos")},
    }
    modes = [_PLAIN, *(name for name in _SELECTIONS if name == "off" or values.predictor)]
    modes += [_PERPLEXITY] if values.reference else []
    missing = [mode for mode in modes if not _present(results, f"{label}: {mode}", config)]
    plain: list[list[int]] | None = None
    for mode in tqdm(missing, unit="row", disable=None):
        if mode == _PERPLEXITY:
            row = _perplexities(values, prompts)
        else:
            if plain is None and mode != _PLAIN:
                plain = _decoded(values, prompts, {"kind": "none"}, "off")[1]
            chosen = {"kind": "none"} if mode == _PLAIN else spec
            selection = "off" if mode == _PLAIN else mode
            row, tokens = _decoded(values, prompts, chosen, selection)
            plain = tokens if mode == _PLAIN else plain
            row |= agreement(tokens, plain)
        row = {"id": f"{label}: {mode}", "model": label, "mode": mode, **row}
        results.append(row | {"config": config | {"environment": environment.record()}})


def _present(results: records.Records, name: str, config: dict[str, Any]) -> bool:
    """Whether the row is there; refuses one that was made otherwise."""
    rows = [row for row in results.rows if row["id"] == name]
    same = json.loads(json.dumps(config))
    for row in rows:
        found = {key: value for key, value in row["config"].items() if key != "environment"}
        if found != same:
            changed = sorted(key for key in same if found.get(key) != same[key])
            raise ConfigError(
                f"{results.path}: row {name!r} was made with other values of {', '.join(changed)}; give another "
                "--label or --output, or pass --overwrite"
            )
    return bool(rows)


def _load(values: flags.FlagValues, selection: str) -> specjax.LanguageModel:
    usual = {name: values[name].value for name in ("predictor", "survivors")}
    values.tree_selection = selection
    values.predictor = usual["predictor"] if selection != "off" else None
    values.survivors = usual["survivors"] if selection == "prune" else None
    try:
        return flags_model.load_model(values)
    finally:
        values.tree_selection = "off"
        values.predictor, values.survivors = usual["predictor"], usual["survivors"]


def _decoded(
    values: flags.FlagValues, prompts, spec: dict[str, Any], selection: str
) -> tuple[dict[str, Any], list[list[int]]]:
    """(measurements, tokens by prompt) of one way to decode."""
    model = _load(values, selection)
    if model.module.depth is None:
        raise ConfigError(f"{values.model} has no routers; train them with experiments.train_depth")
    encoded = prompt_files.encode(model, prompts, values.prompts_file)
    names = ("max_new_tokens", "batch_size", "ignore_eos")
    options = {name: values[name].value for name in names}
    drafter = model.drafter(spec)
    found = model.generate(encoded, drafter, **options)
    each = [result.metrics for result in found]
    steps = sum(metrics.num_spec_steps for metrics in each)
    runs = np.sum([metrics.layer_runs for metrics in each], axis=0) / steps
    row = {
        "nodes": model.module.depth.kept_nodes(drafter.num_nodes),
        "drafted_nodes": drafter.num_nodes,
        "steps": steps,
        "new_tokens": sum(metrics.new_tokens for metrics in each),
        "layer_runs_per_pass": [round(float(x), 4) for x in runs],
        "executed_fraction": round(float(runs.mean()), 4),
        "executed_fraction_of_routed": round(
            float(runs[model.module.depth.config.start_layer :].mean()), 4
        ),
        **bytes_read(model.module, runs),
        "acceptance_length": round(
            1 + sum(metrics.num_accepted_draft_tokens for metrics in each) / steps, 4
        ),
        "lossless": each[0].lossless,
        "decode_ms": round(sum(metrics.decode_ms for metrics in each), 1),
        "peak_bytes": model.programs.decode.peak_bytes(),
    }
    return row, [result.output_ids for result in found]


def bytes_read(module, runs: np.ndarray) -> dict[str, int]:
    """Weight bytes that a pass reads: of the layers that ran, all routers, norm and output head; and with all layers.

    Args:
        runs: share of the passes in which each layer ran.
    """
    layers = np.array([prepare.weight_bytes(layer) for layer in module.model.layers])
    head = module.model.embed_tokens if module.lm_head is None else module.lm_head
    always = prepare.weight_bytes(head) + prepare.weight_bytes(module.model.norm)
    extra = prepare.weight_bytes(module.depth.routers)
    if module.depth.predictor is not None:
        extra += prepare.weight_bytes(module.depth.predictor)
    return {
        "weight_bytes_per_pass": round(float(layers @ runs)) + always + extra,
        "weight_bytes_of_all_layers": int(layers.sum()) + always,
        "router_bytes": extra,
    }


def agreement(tokens: list[list[int]], plain: list[list[int]]) -> dict[str, Any]:
    """How much of the output is the routed model's own, token by token.

    `agreement` is the share of positions with the same token; `agreeing_prefix` of those before the first difference.
    """
    same = prefix = total = 0
    for mine, theirs in zip(tokens, plain, strict=True):
        count = max(len(mine), len(theirs))
        equal = [a == b for a, b in zip(mine, theirs, strict=False)]
        equal += [False] * (count - len(equal))
        same, total = same + sum(equal), total + count
        prefix += equal.index(False) if False in equal else count
    return {
        "agreement": round(same / total, 4),
        "agreeing_prefix": round(prefix / total, 4),
        "outputs_equal": sum(a == b for a, b in zip(tokens, plain, strict=True)),
        "prompts": len(tokens),
    }


def _perplexities(values: flags.FlagValues, prompts) -> dict[str, Any]:
    """Of the text that the first reference model writes greedily after the prompts."""
    first = specjax.load(values.reference[0], dtype=values.dtype)
    encoded = prompt_files.encode(first, prompts, values.prompts_file)
    written = first.generate(
        encoded, max_new_tokens=values.max_new_tokens, ignore_eos=values.ignore_eos
    )
    pairs = [(result.input_ids, result.output_ids) for result in written]
    count = sum(len(continuation) for _, continuation in pairs)
    found = {}
    for name in [values.model, *values.reference]:
        model = first if name == values.reference[0] else specjax.load(name, dtype=values.dtype)
        total = sum(likelihood.logprob for _, likelihood in scoring.likelihoods(model, pairs))
        found[name] = round(float(np.exp(-total / count)), 4)
    references = {Path(name).name: found[name] for name in values.reference}
    return {"tokens": count, "perplexity": found[values.model], "references": references}


def markdown(rows: list[dict[str, Any]]) -> str:
    """All rows as tables, with the commands that made them."""
    decoded = [row for row in rows if row["mode"] != _PERPLEXITY]
    header = ["model", "who decides", "nodes", "layers run", "of the routed", "weights read"]
    header += ["acceptance length", "tokens as token by token", "before a difference", "peak MB"]
    cells = [
        [
            row["model"],
            row["mode"] + ("" if row["lossless"] else " (lossy)"),
            f"{row['nodes']} of {row['drafted_nodes']}",
            f"{row['executed_fraction']:.1%}",
            f"{row['executed_fraction_of_routed']:.1%}",
            f"{row['weight_bytes_per_pass'] / 1e6:.2f} of "
            f"{row['weight_bytes_of_all_layers'] / 1e6:.2f} MB",
            f"{row['acceptance_length']:.2f}",
            f"{row['agreement']:.1%}",
            f"{row['agreeing_prefix']:.1%}",
            f"{row['peak_bytes'] / 1e6:.2f}",
        ]
        for row in decoded
    ]
    texts = [tables.markdown(header, cells)]
    scored = [row for row in rows if row["mode"] == _PERPLEXITY]
    if scored:
        names = sorted({name for row in scored for name in row["references"]})
        lines = [
            [row["model"], tables.number(row["perplexity"])]
            + [tables.number(row["references"].get(name)) for name in names]
            for row in scored
        ]
        texts.append(tables.markdown(["model", "perplexity, routed", *names], lines, 1))
    commands = dict.fromkeys(row["config"]["environment"]["command"] for row in rows)
    texts.append("\n".join(["```", *commands, "```"]))
    return "\n\n".join(texts) + "\n"


if __name__ == "__main__":
    common.run(define_flags, main)
