"""HumanEval as SpecMQuant runs it: EvalPlus's chat prompt, 512 tokens, sanitised completions, pass@1.

Rows carry `task_id` and `completion`, so an answer file is a samples file for OpenAI's human-eval and for EvalPlus too.
The prompt has one BOS where the reference has two on Llama-3.
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import specjax
from experiments.benchmarks import base, sandbox, sanitize
from experiments.benchmarks.base import Question
from specjax.errors import ConfigError

_INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code "
    "block:"
)
_OPENING = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
    "\n```python\n"
)
_CUTS = (
    *("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint("),
    "\n```\n",
)
_TEXTS = ("prompt", "entry_point", "test")


@dataclass(frozen=True, kw_only=True)
class HumanEval:
    """The 164 problems; see `Benchmark`."""

    name: str = "human_eval"
    max_new_tokens: int = 512
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    executes_code: bool = True

    def load(self, data_dir: Path) -> list[Question]:
        """Rows of HumanEval.jsonl.gz (or .jsonl)."""
        names = ("human_eval/HumanEval.jsonl.gz", "human_eval/HumanEval.jsonl")
        path = base.find(data_dir, names)
        fields = dict.fromkeys(("task_id", *_TEXTS), str)
        rows = base.read_json_lines(path, _read(path), fields)
        return base.check_unique([_question(row) for row in rows], path)

    def encode(
        self, model: specjax.LanguageModel, question: Question, answers: Sequence[str]
    ) -> list[int]:
        """The instruction as a user turn; the assistant's turn is opened up to the code."""
        user = f"{_INSTRUCTION}\n```\n{question.turns[0].strip()}\n```\n"
        ids = model.encode({"messages": [{"role": "user", "content": user}]})
        return ids + model.tokenizer.encode(_OPENING, add_special_tokens=False)

    def clean(self, text: str) -> str:
        """The text before what shows that the function is over; tabs as four blanks."""
        found = [index for index in map(text.find, _CUTS) if index >= 0]
        return text[: min(found, default=len(text))].replace("\t", "    ")

    def score(self, question: Question, answers: Sequence[str], execute: bool) -> dict[str, Any]:
        """The sanitised completion, and whether it passes the problem's tests where it may be run."""
        task = question.task
        completion = sanitize.sanitize(answers[0], task["entry_point"])
        fields = {"task_id": question.question_id, "completion": completion}
        if not execute:
            return {**fields, "correct": None, "outcome": "not executed"}
        outcome = sandbox.check({"task_id": question.question_id, **task}, completion)
        return {**fields, "correct": outcome == sandbox.PASSED, "outcome": outcome}


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: damaged: {error}") from None


def _question(row: dict[str, Any]) -> Question:
    return Question(
        question_id=row["task_id"],
        category="humaneval",
        subtask="human_eval",
        turns=(row["prompt"],),
        task={name: row[name] for name in _TEXTS},
    )


BENCHMARK = HumanEval()
