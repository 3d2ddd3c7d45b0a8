"""Trains a draft head (EAGLE-1/2, EAGLE-3 or Medusa) for any target that specjax loads.

    python -m experiments.train_eagle --model=smollm2-135m --text_file=text.jsonl --output=HEAD
    python -m experiments.train_eagle --model=DIR --kind=eagle3 --prompts_file=prompts.jsonl --output=HEAD

Text is best written by the target itself: with --prompts_file it first answers these prompts, in batches. The target
then runs once over the text and its features are kept on disk; training reads them. The work folder (default: beside
the output) holds answers, features, Orbax checkpoints and the curve; interrupted at any point and started again with
the same flags, the run goes on. After each checkpoint the held-out examples are evaluated and the head is written to
--output in the upstream layout, with the recipe and the curve in its training.json.
"""

import functools
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import specjax
from experiments.shared import common, flag_groups, own_text, training_runs
from specjax.drafters import draft_vocabulary
from specjax.errors import ConfigError

_log = logging.getLogger(__name__)

# Flags that belong to the recipe: a work folder made with other values is refused.
_RECIPE = (
    *("model", "dtype", "kind", "self_prompts", "seed", *training_runs.TEXT_RECIPE),
    *("draft_vocab_size", "num_heads", "total_steps", "tokens_per_batch", "learning_rate"),
    *("warmup_steps", "weight_decay", "clip_norm", "feature_noise", "unroll", "decay"),
    *("regression_weight", "cross_entropy_weight", "linear_start"),
)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    training_runs.define_run_flags(values, weight_decay=0.0, clip_norm=0.5)
    training_runs.define_text_flags(values)
    with flag_groups.heading(values, "Input"):
        integer(
            *("self_prompts", None),
            "Let the target write so many prompts itself first (as Magpie, arXiv 2406.08464), and answer them.",
            lower_bound=1,
        )
    with flag_groups.heading(values, "Drafter"):
        flags.DEFINE_enum(
            *("kind", "eagle", ("eagle", "eagle3", "medusa"), "Head to train."), flag_values=values
        )
        integer(
            *("draft_vocab_size", None),
            "Tokens that the loss is taken over, and EAGLE-3 drafts from: the text's most frequent. Default: all; for "
            "eagle3 at most 32000.",
            lower_bound=2,
        )
        integer("num_heads", 4, "Medusa heads.", lower_bound=1)
        flags.DEFINE_enum(
            *("head_layout", "upstream", ("upstream", "speculators")),
            "Layout of the folder that is written; speculators (vLLM's) takes eagle3.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Training"):
        number("learning_rate", None, "Peak. Default: 3e-4; medusa 1e-3.", lower_bound=0.0)
        number(
            "feature_noise",
            None,
            "Width of the noise. Default: 0.2 for eagle, else 0.",
            lower_bound=0.0,
        )
        integer("unroll", None, "Drafting steps in the loss. Default: 1; eagle3 5.", lower_bound=1)
        number(
            "decay", None, "Weight of a step (or head) over the one before. Default: 0.8; medusa 1."
        )
        number("regression_weight", None, "Smooth L1 of features. Default: 1 for eagle, else 0.")
        number("cross_entropy_weight", None, "Soft cross-entropy. Default: 0.1 for eagle, else 1.")
        flags.DEFINE_boolean(
            "linear_start",
            True,
            "Start an eagle head as the linear map that best predicts the next feature.",
            flag_values=values,
        )


def main(values: flags.FlagValues) -> None:
    """Trains up to --total_steps."""
    _check(values)
    work, output = training_runs.claim(values, _RECIPE)
    model = specjax.load(values.model, dtype=values.dtype)
    if model.tokenizer is None:
        raise ConfigError(f"{values.model} has no tokenizer files, which the text needs")
    run = _Run(values, model, work, output)
    run.features()
    run.train()
    print(json.dumps(run.curve[-1] if run.curve else {}, indent=1))


def _check(values: flags.FlagValues) -> None:
    if not values.text_file and values.prompts_file is None and values.self_prompts is None:
        raise ConfigError("give --text_file, --prompts_file or --self_prompts")
    if values.prompts_file is not None and values.self_prompts is not None:
        raise ConfigError("--prompts_file and --self_prompts exclude each other")
    if values.head_layout == "speculators" and values.kind != "eagle3":
        raise ConfigError(
            f"--head_layout=speculators with --kind={values.kind}: that layout takes eagle3"
        )
    training_runs.check_text(values)


class _Run:
    """One training run: text, features, trainer, curve."""

    def __init__(self, values: flags.FlagValues, model, work: Path, output: Path):
        from specjax.training import features, text

        self._values, self._model, self._work, self._output = values, model, work, output
        target = model.module
        files = [Path(name) for name in values.text_file]
        prompts, answers = values.prompts_file and Path(values.prompts_file), None
        if values.self_prompts is not None:
            prompts = own_text.prompts(values, model, work)
        if prompts:
            answers = own_text.answers(values, model, prompts, work)
            files.append(answers)
        examples = training_runs.read_text(values, model.tokenizer, answers)
        self._examples, self._held_out = text.split(
            examples, values.held_out, values.seed, values.max_documents
        )
        self._ranking = _ranking(values, self._examples, model, files)
        self._ids = np.arange(model.config.vocab_size)
        if self._ranking is not None:
            self._ids = self._ranking.first(None, model.stop_ids)
        self._head, self._loss, needs = _new_head(values, target, self._ids)
        fingerprint = {
            "model": values.model,
            "dtype": target.dtype.name,
            "needs": str(needs),
            "files": training_runs.digests(files),
        }
        fingerprint |= {
            name: values[name].value for name in ("max_length", "max_documents", "seed", "held_out")
        }
        self._stores = [
            features.FeatureStore(work / name, rows, model.config, needs, fingerprint)
            for name, rows in (("features", self._examples), ("held_out", self._held_out))
        ]
        self.curve = []

    def features(self) -> None:
        """Runs the target over the text."""
        pairs = list(zip(self._stores, (self._examples, self._held_out), strict=True))
        total = sum(len(e.tokens) for _, examples in pairs for e in examples)
        with tqdm(total=total, unit="tok", desc="features") as bar:
            for store, _ in pairs:
                store.compute(self._model.module, self._values.tokens_per_batch, bar.update)

    def train(self) -> None:
        """Trains, evaluates and exports."""
        from specjax.training import batches, initial, loop, vocabulary

        values, target = self._values, self._model.module
        checkpoints = self._work / "checkpoints"
        resumes = any(child.name.isdigit() for child in checkpoints.glob("*"))
        if values.kind == "eagle" and values.linear_start and not resumes:
            initial.fit_linear(self._head, target, self._examples, self._stores[0])
        vocab = vocabulary.of_target(target, self._ids)
        trainer = loop.Trainer(
            self._head, self._loss, _weights(values), _settings(values), checkpoints
        )
        training, held_out = (
            (rows, store, batches.plan([len(e.tokens) for e in rows], values.tokens_per_batch))
            for rows, store in zip((self._examples, self._held_out), self._stores, strict=True)
        )
        self.curve = training_runs.train(
            trainer,
            self._work,
            run=lambda *callbacks: trainer.run(target, vocab, *training, *callbacks),
            evaluate=lambda: trainer.evaluate(target, vocab, *held_out),
            summary=loop.summary,
            shown=lambda measured: {"top1": measured["agreement"][0]},
            export=lambda curve: self._export(trainer.head(), curve),
        )

    def _export(self, head, curve) -> None:
        from specjax.training import export

        facts = training_runs.facts(self._values, _RECIPE, self._examples, curve)
        ranking = self._ranking if self._values.kind == "eagle" else None
        export.write(
            *(head, self._output),
            ranking=ranking,
            facts=facts,
            overwrite=True,
            layout=self._values.head_layout,
            target=self._model.module,
            target_name=self._values.model,
        )


def _ranking(values: flags.FlagValues, examples, model, files: list[Path]):
    """The most frequent tokens of the text, as many as the draft vocabulary has; None for all tokens."""
    size = values.draft_vocab_size or (32000 if values.kind == "eagle3" else None)
    if size is None:
        return None
    documents = [example.tokens[example.response :] for example in examples]
    names = ", ".join(file.name for file in files)
    return draft_vocabulary.from_documents(documents, model, names, size)


def _new_head(values: flags.FlagValues, target, ids: np.ndarray):
    """(untrained head, its loss, what it needs of the target)."""
    from specjax.training import initial, losses

    key = jax.random.key(values.seed)
    if values.kind == "medusa":
        return initial.medusa_heads(target, values.num_heads), losses.medusa, "final"
    if values.kind == "eagle":
        return initial.eagle_head(target, key), losses.unrolled, "final"
    head = initial.eagle3_head(target, key, jnp.asarray(ids))
    return head, losses.unrolled, head.needs


def _default(value, otherwise):
    return otherwise if value is None else value


def _weights(values: flags.FlagValues):
    from specjax.training import losses

    eagle = values.kind == "eagle"
    return losses.Weights(
        steps=_default(values.unroll, 5 if values.kind == "eagle3" else 1),
        regression=_default(values.regression_weight, 1.0 if eagle else 0.0),
        cross_entropy=_default(values.cross_entropy_weight, 0.1 if eagle else 1.0),
        decay=_default(values.decay, 1.0 if values.kind == "medusa" else 0.8),
    )


def _settings(values: flags.FlagValues):
    return training_runs.settings(
        values,
        learning_rate=_default(values.learning_rate, 1e-3 if values.kind == "medusa" else 3e-4),
        feature_noise=_default(values.feature_noise, 0.2 if values.kind == "eagle" else 0.0),
    )


if __name__ == "__main__":
    common.run(define_flags, main)
