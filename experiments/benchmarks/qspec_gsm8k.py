"""The workload of QSpec's demo: 32 questions of GSM8K's training split after five worked examples, as a chat turn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import specjax
from experiments.benchmarks import gsm8k
from experiments.benchmarks.base import Question
from specjax.errors import ConfigError

_EXAMPLES, _QUESTIONS, _SEED = 5, 32, 0


@dataclass(frozen=True, kw_only=True)
class QSpecGsm8k:
    """See `Benchmark`."""

    name: str = "qspec_gsm8k"
    max_new_tokens: int = 1024
    ignore_eos: bool = False
    stop: tuple[str, ...] = ("Question:",)
    executes_code: bool = False

    def load(self, data_dir: Path) -> list[Question]:
        """Questions drawn at random (seed 0) from the training split behind its first five rows."""
        rows, path = gsm8k.read_split(data_dir, "train")
        rest = range(_EXAMPLES, len(rows))
        if len(rest) == 0:
            raise ConfigError(f"{path}: {len(rows)} rows; more than {_EXAMPLES} are needed")
        examples = "".join(
            f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows[:_EXAMPLES]
        )
        chosen = random.Random(_SEED).sample(rest, min(_QUESTIONS, len(rest)))
        questions = []
        for index in chosen:
            asked = {**rows[index], "question": f"{examples}Question: {rows[index]['question']}"}
            questions.append(gsm8k.question(index, asked, path))
        return questions

    def encode(
        self, model: specjax.LanguageModel, question: Question, answers: Sequence[str]
    ) -> list[int]:
        """One user turn through the model's chat template."""
        return model.encode({"prompt": question.turns[0] + "\nAnswer:"})

    def clean(self, text: str) -> str:
        """Without surrounding blanks."""
        return text.strip()

    def score(self, question: Question, answers: Sequence[str], execute: bool) -> dict[str, Any]:
        """The last number of the answer; "#### n", which the examples show, comes last as well."""
        return gsm8k.exact_match(question, answers)


BENCHMARK = QSpecGsm8k()
