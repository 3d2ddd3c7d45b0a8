"""What a benchmark is, and the files its questions come from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import specjax
from specjax.errors import ConfigError

_PROMPTS = Path(__file__).resolve().parent.parent / "presets" / "prompts"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        question_id: unique within its benchmark.
        category: as the data name it.
        subtask: what reports group by.
        turns: what the user says, turn by turn.
        task: what scoring needs to know, e.g. the right answer.
    """

    question_id: int | str
    category: str
    subtask: str
    turns: tuple[str, ...]
    task: dict[str, Any] = field(default_factory=dict)


class Benchmark(Protocol):
    """A set of questions with its way of asking and scoring.

    Attributes:
        name: as --benchmark names it.
        max_new_tokens: per turn, as the reference runs it.
        ignore_eos: go on after stop tokens, so that every answer has `max_new_tokens` tokens.
        stop: strings that end an answer.
        executes_code: scoring runs what the model wrote.
    """

    name: str
    max_new_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    executes_code: bool

    def load(self, data_dir: Path) -> list[Question]:
        """All questions in the order of the data.

        Raises:
            FileNotFoundError: the data are not under `data_dir`.
            ConfigError: they are malformed, or a package that reads them is missing.
        """

    def encode(
        self, model: specjax.LanguageModel, question: Question, answers: Sequence[str]
    ) -> list[int]:
        """Prompt of the turn that follows `answers`."""

    def clean(self, text: str) -> str:
        """The part of a decoded generation that counts as the answer."""

    def score(self, question: Question, answers: Sequence[str], execute: bool) -> dict[str, Any]:
        """Fields about the quality of the answers, without a model; empty where nothing is scored automatically.

        Args:
            execute: run code that the model wrote; without it `correct` is None where that would be needed.
        """


def prompt_text(name: str) -> str:
    """A prompt that ships with the binaries."""
    return (_PROMPTS / name).read_text(encoding="utf-8")


def find(data_dir: Path, candidates: Sequence[str]) -> Path:
    """The first of the paths (glob patterns) that exists under `data_dir`.

    Raises:
        FileNotFoundError: none does.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data_dir={str(data_dir)!r} is not a directory")
    for pattern in candidates:
        found = sorted(data_dir.glob(pattern))
        if found:
            return found[0]
    raise FileNotFoundError(f"--data_dir={str(data_dir)!r} has none of: {', '.join(candidates)}")


def read_json_lines(path: Path, text: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines text whose `fields` have the stated types.

    Raises:
        ConfigError: a line is not such an object, or there are none; the line is named.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not valid JSON: {error}") from None
        check_fields(row, fields, f"{path}:{number}")
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path}: no questions")
    return rows


def check_fields(row: Any, fields: dict[str, type], where: str) -> None:
    """Raises ConfigError unless `row` is an object whose `fields` have the stated types."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object, found {type(row).__name__}")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            raise ConfigError(
                f"{where}: field {name!r} is {row.get(name)!r:.80}; expected {kind.__name__}"
            )


def check_unique(questions: Sequence[Question], path: Path) -> list[Question]:
    """The questions, if their ids are unique.

    Raises:
        ConfigError: an id occurs twice.
    """
    seen = set()
    for question in questions:
        if question.question_id in seen:
            raise ConfigError(f"{path}: question_id {question.question_id!r} occurs twice")
        seen.add(question.question_id)
    return list(questions)
