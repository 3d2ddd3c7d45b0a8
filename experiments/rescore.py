"""Scores answer files again, without a model.

    python -m experiments.rescore --answers=FILE,FILE --data_dir=DIR [--allow_code_execution]

The score fields of the rows (`correct` and what it rests on) are computed anew from the answers' texts; each file is
replaced as a whole.
"""

import json
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments import benchmarks
from experiments.shared import answers, common, flag_groups, records
from specjax.errors import ConfigError


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_list("answers", None, "Answer files.", flag_values=values)
        flags.DEFINE_string(
            "data_dir", None, "Directory of the benchmarks' data.", flag_values=values
        )
    with flag_groups.heading(values, "Execution"):
        flags.DEFINE_boolean(
            "allow_code_execution",
            False,
            "HumanEval: run what the model wrote, with your permissions, in a process with limited time and memory.",
            flag_values=values,
        )
    flags.mark_flags_as_required(["answers", "data_dir"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Rescores every file and prints what is right in it."""
    for name in values.answers:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"--answers: {path} is not a file")
        rows = rescored(path, Path(values.data_dir), values.allow_code_execution)
        with records.atomic(path) as temporary:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text("".join(lines), encoding="utf-8")
        scored = answers.accuracy(rows)
        result = "nothing is scored" if scored is None else f"{scored[0]} of {scored[1]} correct"
        print(f"{path}: {len(rows)} rows, {result}")


def rescored(path: Path, data_dir: Path, execute: bool) -> list[answers.Row]:
    """The rows of an answer file with new scores.

    Raises:
        ConfigError: the file mixes benchmarks, or has answers to questions that the data lack.
    """
    rows = records.Records(path).rows
    names = {row["config"].get("benchmark") for row in rows}
    if len(names) != 1:
        raise ConfigError(
            f"{path}: answers to {len(names)} benchmarks {sorted(map(str, names))}; one is needed"
        )
    benchmark = benchmarks.lookup(names.pop())
    if benchmark.executes_code and not execute:
        raise ConfigError(
            f"{path}: scoring {benchmark.name} runs what the model wrote: pass --allow_code_execution"
        )
    questions = {question.question_id: question for question in benchmark.load(data_dir)}
    out = []
    for row in tqdm(rows, desc=path.name, unit="row", disable=None):
        if row["id"] not in questions:
            raise ConfigError(f"{path}: row {row['id']!r}: {data_dir} has no such question")
        if row.get("error") is None:
            texts = answers.choice(row)["turns"]
            config = row.pop("config")
            row |= benchmark.score(questions[row["id"]], texts, execute) | {"config": config}
        out.append(row)
    return out


if __name__ == "__main__":
    common.run(define_flags, main)
