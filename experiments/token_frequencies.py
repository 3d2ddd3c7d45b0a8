"""Ranks the tokens of a model by how often they occur in a text, for reduced draft vocabularies (FR-Spec).

    python -m experiments.token_frequencies --model=smollm2-135m --text_file=text.txt --size=16384 \\
        --output=frequencies.json
    python -m experiments.generate --model=smollm2-135m --prompt=... \\
        --drafter='{"kind": "eagle", "vocabulary": "frequencies.json", "vocabulary_size": 8192}'

--text_file is .txt (one document), .json or .jsonl (fields as for calibration: `text`, `messages`, `turns`, or `prompt`
with `response`). Without it the order of the tokenizer's merges is written, which needs no text. The table says which
share of the text the most frequent tokens cover.
"""

import dataclasses
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

import specjax
from experiments.shared import common, flag_groups, records
from specjax import checkpoints
from specjax.drafters import draft_vocabulary
from specjax.errors import ConfigError
from specjax.files import hub
from specjax.quantize import calibration
from specjax.text import tokenizer

_SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Model"):
        flags.DEFINE_string(
            "model",
            None,
            "As for experiments.generate; only its tokenizer is read.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("text_file", None, "Text to count.", flag_values=values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON file to write.", flag_values=values)
        flags.DEFINE_integer(
            "size",
            None,
            "List so many tokens; default: all that occur.",
            lower_bound=1,
            flag_values=values,
        )
    flags.mark_flags_as_required(["model", "output"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Counts, writes, prints the coverage."""
    output = records.check_output(values.output, ".json")
    model = _tokenizer_only(values.model)
    if values.text_file is None:
        ranking = draft_vocabulary.from_merges(model)
        ranking = dataclasses.replace(ranking, token_ids=ranking.token_ids[: values.size])
    else:
        path = Path(values.text_file)
        documents = calibration.read_documents(path, model.tokenizer)
        ranking = draft_vocabulary.from_documents(documents, model, path.name, values.size)
    draft_vocabulary.write(ranking, output)
    print_table(ranking)
    print(f"{len(ranking.token_ids)} tokens from {ranking.source} -> {output}")


def _tokenizer_only(name: str) -> specjax.LanguageModel:
    """A model without its weights."""
    path = hub.resolve(name)
    checkpoint = checkpoints.open_checkpoint(path)
    found = tokenizer.load(path, checkpoint)
    if found is None:
        raise ConfigError(f"--model={name}: has no tokenizer")
    return specjax.LanguageModel(name=name, config=checkpoint.config, module=None, tokenizer=found)


def print_table(ranking: draft_vocabulary.TokenRanking) -> None:
    """Coverage by size, where tokens were counted."""
    if not ranking.coverage:
        return
    table = Table("vocabulary_size", "share of the text")
    listed = len(ranking.token_ids)
    for size in (*(s for s in _SIZES if s < listed), listed):
        table.add_row(str(size), f"{ranking.coverage[size - 1]:.4f}")
    Console().print(table)


if __name__ == "__main__":
    common.run(define_flags, main)
