"""Which training documents share an n-gram of words with a benchmark.

    python -m experiments.overlap --text_file=train.jsonl --data_dir=DATA --output=overlap.json

Words are runs of letters and digits, in lower case. Questions of all turns and reference answers count. Prints and
writes per benchmark how many documents overlap, and their line numbers; exits with 1 if any does, so that a recipe can
rely on it. --clean=FILE writes the documents without overlap.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import benchmarks
from experiments.shared import common, flag_groups, records
from specjax.errors import ConfigError

_DEFAULT = ["mt_bench", "spec_bench", "gsm8k", "human_eval"]
_WORD = re.compile(r"[^\W_]+")


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    string = flags.DEFINE_string
    with flag_groups.heading(values, "Input"):
        string("text_file", None, "Documents, one JSON object per line.", flag_values=values)
        string("data_dir", None, "Folder of the benchmarks' data.", flag_values=values)
        flags.DEFINE_list("benchmarks", _DEFAULT, "Benchmarks to compare with.", flag_values=values)
        flags.DEFINE_integer("n", 13, "Words of an n-gram.", lower_bound=2, flag_values=values)
    with flag_groups.heading(values, "Output"):
        string("output", None, "JSON file for the counts.", flag_values=values)
        string(
            "clean", None, "JSON lines file for the documents without overlap.", flag_values=values
        )
    flags.mark_flags_as_required(["text_file", "data_dir"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Compares every document with every benchmark."""
    path = Path(values.text_file)
    lines = path.read_text(encoding="utf-8").split("\n")
    documents = {
        number: set(ngrams(_strings(_parsed(line, f"{path}:{number}")), values.n))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    }
    if not documents:
        raise ConfigError(f"{path}: no documents")
    result = {"text_file": path.name, "documents": len(documents), "n": values.n, "overlap": {}}
    overlapping = set()
    for name in values.benchmarks:
        questions = benchmarks.lookup(name).load(Path(values.data_dir))
        known = {gram for q in questions for gram in ngrams(_strings([q.turns, q.task]), values.n)}
        found = [number for number, grams in documents.items() if not known.isdisjoint(grams)]
        result["overlap"][name] = {
            "questions": len(questions),
            "ngrams": len(known),
            "lines": found,
        }
        overlapping.update(found)
    print(json.dumps(result, indent=1))
    if values.output:
        with records.atomic(values.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if values.clean:
        kept = [lines[number - 1] for number in documents if number not in overlapping]
        with records.atomic(values.clean) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    elif overlapping:
        sys.exit(1)


def ngrams(texts: Iterable[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of `n` words of each text."""
    for text in texts:
        words = _WORD.findall(text.lower())
        for start in range(len(words) - n + 1):
            yield tuple(words[start : start + n])


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


if __name__ == "__main__":
    common.run(define_flags, main)
