"""Trains the Predictor of SpaDec: which nodes of a draft tree will be accepted, seen from an early layer.

    python -m experiments.train_predictor --model=ROUTED --drafter=eagle --draft_checkpoint=HEAD \\
        --prompts_file=prompts.jsonl --layer=6 --output=PREDICTOR

The model decodes the prompts greedily with the drafter, all nodes voting on the layers; of every drafted node the
hidden state that enters --layer is kept, and whether the node was accepted. A class-balanced logistic regression is
fitted to most of the prompts and measured on the nodes of the others. The nodes are kept in a work folder beside the
output, batch by batch; an interrupted run goes on.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments.shared import (
    common,
    environment,
    flag_groups,
    flags_drafter,
    flags_model,
    naming,
    prompt_files,
    records,
    training_runs,
)
from specjax.decoding import target as passes
from specjax.depth import predictor
from specjax.engine import engine
from specjax.errors import ConfigError
from specjax.training.depth import nodes, regression

_RECIPE = (
    *("model", "depth", "drafter", *flags_drafter.DRAFTER_FLAGS, "prompts_file", "layer"),
    *("max_new_tokens", "batch_size", "ignore_eos", "dtype"),
)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_model.define(values)
    flags_drafter.define(values, "eagle")
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
    with flag_groups.heading(values, "Sampling"):
        flags.DEFINE_integer("max_new_tokens", 96, "Per prompt.", lower_bound=2, flag_values=values)
        flags.DEFINE_boolean("ignore_eos", False, "Go on after stop tokens.", flag_values=values)
    with flag_groups.heading(values, "Training"):
        flags.DEFINE_integer(
            "layer", 6, "The predictor reads what enters it.", lower_bound=1, flag_values=values
        )
        flags.DEFINE_float(
            "held_out", 0.2, "Share of the prompts that measure.", 0.01, 0.9, flag_values=values
        )
        flags.DEFINE_float("ridge", 1e-3, "Penalty of large weights.", 0.0, flag_values=values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "Folder for the predictor.", flag_values=values)
        flags.DEFINE_string(
            "work_dir", None, "Folder for the nodes. Default: OUTPUT.work.", flag_values=values
        )
        flags.DEFINE_boolean("overwrite", False, "Replace another --output.", flag_values=values)
    with flag_groups.heading(values, "Execution"):
        flags.DEFINE_integer(
            "batch_size", 4, "Prompts together.", lower_bound=1, flag_values=values
        )
    flags.mark_flags_as_required(["prompts_file", "output"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Collects nodes, fits, measures, writes."""
    if values.tree_selection != "off":
        raise ConfigError("--tree_selection: nodes are collected with 'off', all of them voting")
    spec = flags_drafter.spec(values)
    prompts = prompt_files.read_prompts(values.prompts_file)
    work, output = training_runs.claim(values, _RECIPE)
    model = flags_model.load_model(values, [spec])
    if values.layer >= model.config.num_layers:
        raise ConfigError(f"--layer={values.layer}: the model has {model.config.num_layers} layers")
    encoded = prompt_files.encode(model, prompts, values.prompts_file)
    _collect(values, model, model.drafter(spec), encoded, work)
    held_out = max(1, round(values.held_out * len(prompts)))
    if held_out >= len(prompts):
        raise ConfigError(f"{values.prompts_file}: {len(prompts)} prompts; at least 2 are needed")
    features, labels, prompt = _read(work, -(-len(prompts) // values.batch_size))
    measuring = prompt % -(-len(prompts) // held_out) == 0
    weight, bias = regression.fit(features[~measuring], labels[~measuring], values.ridge)
    made = predictor.Predictor(
        jnp.asarray(weight, jnp.float32), jnp.float32(bias), layer=values.layer
    )
    facts = _facts(made, features, labels, measuring)
    facts["drafter"] = naming.full_spec(spec)
    facts["environment"] = environment.record()
    predictor.save(made, output, facts, overwrite=True)
    shown = ("nodes", "accepted", "auc", "auc_training")
    print(json.dumps({name: facts[name] for name in shown}), f"-> {output}")


def _collect(values: flags.FlagValues, model, drafter, encoded, work: Path) -> None:
    """One file of nodes per batch of prompts; those that are there are left."""
    size = values.batch_size
    longest = -(-max(map(len, encoded)) // engine.MAX_CHUNK) * engine.MAX_CHUNK
    room = drafter.max_depth + 1 + passes.padded_nodes(drafter.scratch)
    shape = size, engine.bucket(longest + values.max_new_tokens + room), values.max_new_tokens
    stop_ids = () if values.ignore_eos else model.stop_ids
    collector = nodes.Collector(model.module, drafter, values.layer, stop_ids, shape)
    for begin in tqdm(range(0, len(encoded), size), unit="batch", desc="nodes", disable=None):
        path = _file(work, begin // size)
        if path.is_file():
            continue
        found = list(collector.nodes(encoded[begin : begin + size]))
        width = model.config.hidden_size
        features = [rows for _, rows, _ in found] or [np.zeros((0, width), np.float32)]
        labels = [kept for _, _, kept in found] or [np.zeros(0, bool)]
        prompt = [np.full(len(kept), begin + row) for row, _, kept in found] or [np.zeros(0, int)]
        with records.atomic(path) as temporary:
            np.savez(
                temporary,
                features=np.concatenate(features).astype(np.float32),
                labels=np.concatenate(labels),
                prompt=np.concatenate(prompt),
            )


def _file(work: Path, index: int) -> Path:
    return work / f"nodes-{index:05d}.npz"


def _read(work: Path, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and prompt of all nodes."""
    parts = [np.load(_file(work, index)) for index in range(count)]
    names = ("features", "labels", "prompt")
    features, labels, prompt = (np.concatenate([part[name] for part in parts]) for name in names)
    return features, labels, prompt


def _facts(made, features, labels, measuring) -> dict:
    scores = np.asarray(made(jnp.asarray(features)))
    return {
        "nodes": len(labels),
        "accepted": int(labels.sum()),
        "held_out_nodes": int(measuring.sum()),
        "auc": round(regression.auc(scores[measuring], labels[measuring]), 4),
        "auc_training": round(regression.auc(scores[~measuring], labels[~measuring]), 4),
        "mean_score": {
            name: round(float(scores[measuring & (labels == value)].mean()), 4)
            for name, value in (("accepted", True), ("rejected", False))
        },
    }


if __name__ == "__main__":
    common.run(define_flags, main)
