"""How many drafted tokens targets accepted, and at which depth: a table of files that experiments.generate wrote.

    python -m experiments.generate --model=smollm2-135m --prompts_file=p.jsonl --drafter=none --output=none.jsonl
    python -m experiments.generate --model=smollm2-135m --prompts_file=p.jsonl --drafter=ngram --output=ngram.jsonl
    python -m experiments.acceptance --inputs=none.jsonl,ngram.jsonl --output=acceptance.md

The acceptance length is the mean number of tokens per step, the one that the target adds included. `at depth d` is the
share of steps with d - 1 accepted tokens or more in which a d-th was accepted. Only prompts that all files have count.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments.shared import common, flag_groups, naming, prompt_files, records, tables
from specjax.errors import ConfigError

_NEEDED = {"id", "output_ids", "acceptance_histogram", "config"}


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_list("inputs", None, "Files of experiments.generate.", flag_values=values)
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "Markdown file to write.", flag_values=values)
    flags.mark_flag_as_required("inputs", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Prints the table, and writes it."""
    output = None if values.output is None else records.check_output(values.output, ".md")
    files = {Path(name).name: _read(Path(name)) for name in values.inputs}
    if len(files) < len(values.inputs):
        raise ConfigError(f"--inputs={','.join(values.inputs)}: two files of one name")
    text = table(files)
    print(text)
    if output is not None:
        with records.atomic(output) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _read(path: Path) -> dict[Any, dict[str, Any]]:
    """Rows by id.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: it has no rows of experiments.generate.
    """
    rows = [row for _, row in prompt_files.read_objects(path)]
    if not rows or not all(row.keys() >= _NEEDED for row in rows):
        raise ConfigError(
            f"{path}: no file of experiments.generate, whose rows have {', '.join(sorted(_NEEDED))}"
        )
    return {row["id"]: row for row in rows}


def table(files: dict[str, dict[Any, dict[str, Any]]]) -> str:
    """A row per file: lengths and depths, then the histograms; outputs are compared with the first file's."""
    shared = set.intersection(*(set(rows) for rows in files.values()))
    if not shared:
        raise ConfigError(f"{', '.join(files)}: no prompt occurs in all of them")
    counts = {name: _histogram(rows[key] for key in shared) for name, rows in files.items()}
    deepest = max(len(count) for count in counts.values()) - 1
    header = ["model", "drafter", "acceptance length", "steps", "tokens", "same tokens"]
    header += [f"at depth {depth}" for depth in range(1, deepest + 1)]
    first = next(iter(files.values()))
    lines, histograms = [], []
    for name, rows in files.items():
        config, count = next(iter(rows.values()))["config"], counts[name]
        equal = sum(rows[key]["output_ids"] == first[key]["output_ids"] for key in shared)
        new_tokens = sum(len(rows[key]["output_ids"]) for key in shared)
        names = [Path(config["model"]).name, naming.short_label(config["drafter"])]
        histograms.append([*names, *map(str, count), *["-"] * (deepest + 1 - len(count))])
        lines.append(
            [
                *names,
                f"{1 + np.arange(len(count)) @ count / max(count.sum(), 1):.2f}",
                *(str(count.sum()), str(new_tokens), f"{equal} of {len(shared)}"),
                *at_depth(count, deepest),
            ]
        )
    accepted = [*header[:2], *(f"{number} accepted" for number in range(deepest + 1))]
    return (
        f"{len(shared)} prompts\n\n{tables.markdown(header, lines)}\n\n"
        f"Steps by accepted tokens:\n\n{tables.markdown(accepted, histograms)}"
    )


def _histogram(rows) -> np.ndarray:
    """Steps by accepted tokens, over rows."""
    return np.sum([row["acceptance_histogram"] for row in rows], axis=0)


def at_depth(count: Sequence[int], deepest: int) -> list[str]:
    """Share of the steps that accepted d - 1 tokens or more in which a d-th was accepted, for d = 1 .. deepest."""
    reached = np.cumsum(count[::-1])[::-1]
    shares = [f"{b / a:.3f}" if a else "-" for a, b in itertools.pairwise(reached)]
    return shares + ["-"] * (deepest - len(shares))


if __name__ == "__main__":
    common.run(define_flags, main)
