"""How often does a model under cheaper activations choose the token that it chooses under its own? (QSpec's analysis)

    python -m experiments.similarity --model=smollm2-135m --candidate=w4a8 --prompts_file=prompts.jsonl \\
        --output=similarity.jsonl
    python -m experiments.similarity --model=DIR --candidate=w4a4 --benchmark=gsm8k --data_dir=DIR --output=...

The reference (the model as it is stored, or under --scheme) continues every prompt greedily; at each of its tokens the
candidate, given the same text, says what it would have chosen. --output receives a row per prompt and a summary row
("record": "similarity") with the match rate, that of the positions where the reference's first choice has more than
80 %, and the joint histogram of both first choices' probabilities, where they agree and where not. Rows are appended;
`experiments.report` draws the summaries.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax
from tqdm import tqdm

from experiments import benchmarks, evaluate
from experiments.shared import (
    common,
    environment,
    flag_groups,
    flags_model,
    preset,
    prompt_files,
    records,
)
from specjax.decoding import sampling as sample
from specjax.engine import engine
from specjax.errors import ConfigError
from specjax.models import cache as kv
from specjax.models import layers

_BINS = 20
_CONFIDENT = 0.8


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    preset.define_flags(values)
    flags_model.define(values, required=False)
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    with flag_groups.heading(values, "Input"):
        string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
        string("benchmark", None, "First turns of a benchmark instead.", flag_values=values)
        string("data_dir", None, "Directory of the benchmarks' data.", flag_values=values)
        integer("limit", None, "At most so many prompts.", lower_bound=1, flag_values=values)
    with flag_groups.heading(values, "Sampling"):
        integer("max_new_tokens", 128, "Tokens per prompt.", lower_bound=1, flag_values=values)
    with flag_groups.heading(values, "Measuring"):
        string("candidate", None, "Activation scheme to compare, e.g. w4a4.", flag_values=values)
    with flag_groups.heading(values, "Output"):
        string("output", None, "JSON lines; rows are appended.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Generates, compares, writes."""
    preset.apply(values)
    if values.candidate is None:
        raise ConfigError("--candidate=SCHEME is needed")
    output = records.check_output(values.output, ".jsonl")
    prompts = _prompts(values)
    if values.dequantize == "auto":
        values.dequantize = "never"
    model = flags_model.load_model(values)
    candidate = model.module.with_scheme(values.candidate)
    encoded = prompts(model)
    config = _config(values, model)
    rows = []
    results = model.generate_iter(list(encoded.values()), max_new_tokens=values.max_new_tokens)
    names = list(encoded)
    with flags_model.profiled(values):
        for index, result in tqdm(results, total=len(names), unit="prompt", disable=None):
            found = compare(model.module, candidate, result.input_ids, result.output_ids)
            rows.append({"record": "similarity_prompt", "id": names[index], **found})
    summary = {
        "record": "similarity",
        "label": Path(values.model).name,
        "reference": config["weights"],
        "candidate": values.candidate,
        **summarize(rows),
    }
    records.append_rows(output, [row | {"config": config} for row in [*rows, summary]])
    print(
        f"{summary['reference']} and {values.candidate}: the same token at {summary['match_rate']:.1%} of "
        f"{summary['num_positions']} positions -> {output}"
    )


def _prompts(values: flags.FlagValues):
    """A function model -> {id: token ids}; what can be wrong with the data is found here."""
    if (values.prompts_file is None) == (values.benchmark is None):
        raise ConfigError("give either --prompts_file=FILE or --benchmark=NAME with --data_dir=DIR")
    if values.prompts_file is not None:
        read = prompt_files.read_prompts(values.prompts_file)[: values.limit]
        names = [prompt["id"] for prompt in read]
        source = values.prompts_file
        return lambda model: dict(zip(names, prompt_files.encode(model, read, source), strict=True))
    if values.data_dir is None:
        raise ConfigError("--benchmark needs --data_dir")
    benchmark = benchmarks.lookup(values.benchmark)
    chosen = evaluate.choose(benchmark.load(Path(values.data_dir)), values.limit, None)
    return lambda model: {q.question_id: benchmark.encode(model, q, []) for q in chosen}


def _config(values: flags.FlagValues, model) -> dict[str, Any]:
    weights = values.scheme or evaluate.describe_weights(values.model)
    source = values.benchmark or Path(values.prompts_file).name
    return {
        **flags_model.model_config(values),
        "dtype": model.dtype_name,
        "weights": weights,
        "candidate": values.candidate,
        "prompts": source,
        "max_new_tokens": values.max_new_tokens,
        "backend": values.backend,
        "environment": environment.record(),
    }


def compare(reference, candidate, prompt: list[int], output: list[int]) -> dict[str, Any]:
    """First choices of two modules at every token of `output`.

    Returns:
        `output_ids`, `candidate_ids`, and the probabilities of both first choices, `reference_top`, `candidate_top`.
    """
    text = [*prompt, *output]
    width = engine.bucket(len(text) - 1)
    inputs = np.zeros((1, width), np.int32)
    inputs[0, : len(text) - 1] = text[:-1]
    place = slice(len(prompt) - 1, len(text) - 1)
    ids, tops = [], []
    for module in (reference, candidate):
        chosen, top = _first_choices(module, jnp.asarray(inputs))
        ids.append(np.asarray(chosen)[0, place].tolist())
        tops.append(np.asarray(top)[0, place].astype(float).tolist())
    return {
        "reference_ids": ids[0],
        "candidate_ids": ids[1],
        "reference_top": tops[0],
        "candidate_top": tops[1],
        "output_ids": output,
    }


@jax.jit
def _first_choices(module, inputs):
    """Argmax and its probability after every prefix of [B, T] tokens; logits of one row at a time."""
    batch, length = inputs.shape
    cache = kv.init(module.config, batch, length, module.dtype)
    block = layers.causal_block(inputs, jnp.zeros((batch,), jnp.int32))

    def of_row(hidden):
        logits = module.logits(hidden)
        top = jnp.exp(jnp.max(logits, -1) - jax.nn.logsumexp(logits, -1))
        return sample.most_likely(logits), top

    return lax.map(of_row, module(block, cache).hidden)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates and histograms over the positions of all prompts."""
    names = ("reference_ids", "candidate_ids", "reference_top", "candidate_top")
    joined = {name: np.concatenate([row[name] for row in rows]) for name in names}
    same = joined["reference_ids"] == joined["candidate_ids"]
    sure = joined["reference_top"] > _CONFIDENT
    edges = np.linspace(0, 1, _BINS + 1)
    histograms = {}
    for name, mask in (("histogram_same", same), ("histogram_other", ~same)):
        # Probabilities may exceed 1 by a rounding.
        pairs = [np.minimum(joined[side][mask], 1) for side in ("reference_top", "candidate_top")]
        histograms[name] = np.histogram2d(*pairs, bins=[edges, edges])[0].astype(int).tolist()
    return {
        "num_prompts": len(rows),
        "num_positions": int(same.size),
        "match_rate": float(same.mean()),
        "reference_confident": float(sure.mean()),
        "match_rate_confident": float(same[sure].mean()) if sure.any() else None,
        **histograms,
    }


if __name__ == "__main__":
    common.run(define_flags, main)
