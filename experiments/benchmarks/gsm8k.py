"""GSM8K as SpecMQuant runs it: eight worked examples as plain text, 256 tokens, exact match of the final number.

Stop tokens do not end an answer, so that every run decodes the same number of tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import specjax
from experiments.benchmarks import base
from experiments.benchmarks.base import Question
from specjax.errors import ConfigError

_TRIGGER = "the answer is"
_NUMBER = re.compile(r"-?\d+\.?\d*")
_FIELDS = {"question": str, "answer": str}


@dataclass(frozen=True, kw_only=True)
class Gsm8k:
    """The test split; see `Benchmark`."""

    name: str = "gsm8k"
    max_new_tokens: int = 256
    ignore_eos: bool = True
    stop: tuple[str, ...] = ()
    executes_code: bool = False

    def load(self, data_dir: Path) -> list[Question]:
        """The test split; ids are its row numbers from 0."""
        rows, path = read_split(data_dir, "test")
        return [question(index, row, path) for index, row in enumerate(rows)]

    def encode(
        self, model: specjax.LanguageModel, question: Question, answers: Sequence[str]
    ) -> list[int]:
        """Eight examples and the question, as raw text."""
        examples = base.prompt_text("gsm8k_8shot.txt")
        return model.encode({"text": f"{examples}Q: {question.turns[0]}\nA:"})

    def clean(self, text: str) -> str:
        """The whole text: the rule for the answer reads it as it is."""
        return text

    def score(self, question: Question, answers: Sequence[str], execute: bool) -> dict[str, Any]:
        """Exact match of the final number, compared as text."""
        return exact_match(question, answers)


def read_split(data_dir: Path, split: str) -> tuple[list[dict[str, Any]], Path]:
    """Rows of a split, from parquet (as the Hugging Face hub has it) or JSON lines (as OpenAI published it).

    Raises:
        FileNotFoundError, ConfigError: see `Benchmark.load`.
    """
    folders = ("gsm8k", "gsm8k/main", "gsm8k/gsm8k/main")
    names = (f"{split}.jsonl", f"{split}-*.parquet")
    path = base.find(data_dir, [f"{folder}/{name}" for name in names for folder in folders])
    if path.suffix == ".jsonl":
        return base.read_json_lines(path, path.read_text(encoding="utf-8"), _FIELDS), path
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"{path}: reading parquet needs pyarrow: pip install pyarrow (part of specjax[eval]), or put a "
            f"{split}.jsonl beside it"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a parquet file: {error}") from None
    for number, row in enumerate(rows):
        base.check_fields(row, _FIELDS, f"{path}: row {number}")
    return rows, path


def question(index: int, row: dict[str, Any], path: Path) -> Question:
    """A row as a question.

    Raises:
        ConfigError: the answer does not end in "#### number".
    """
    _, found, gold = row["answer"].rpartition("####")
    if not found:
        raise ConfigError(f"{path}: row {index}: the answer has no '####' before its final number")
    return Question(
        question_id=index,
        category="gsm8k",
        subtask="gsm8k",
        turns=(row["question"],),
        task={"gold": gold.strip().replace(",", "")},
    )


def final_number(text: str) -> str | None:
    """The number that a chain of thought ends in, as text; None where there is none.

    It is the first number after the first "the answer is", or the last number where the phrase does not occur.
    """
    parts = text.lower().split(_TRIGGER)
    numbers = _NUMBER.findall(parts[1 if len(parts) > 1 else 0].replace(",", ""))
    if not numbers:
        return None
    return numbers[0 if len(parts) > 1 else -1].removesuffix(".")


def exact_match(question: Question, answers: Sequence[str]) -> dict[str, Any]:
    """Score fields of an answer whose final number is compared as text with the right one."""
    prediction, gold = final_number(answers[0]), question.task["gold"]
    return {"prediction": prediction, "gold": gold, "correct": prediction == gold}


BENCHMARK = Gsm8k()
