"""MT-bench as Spec-Bench asks it: two turns per question, the first answer in the context of the second.

The conversation opens with Spec-Bench's system prompt. Nothing is scored automatically.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import specjax
from experiments.benchmarks import base
from experiments.benchmarks.base import Question
from specjax.errors import ConfigError

CATEGORIES = (
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
)


@dataclass(frozen=True, kw_only=True)
class ChatBenchmark:
    """Conversations from a question.jsonl; see `Benchmark`."""

    name: str
    max_new_tokens: int = 1024
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    executes_code: bool = False
    one_subtask: tuple[str, ...] = ()  # categories that count as the subtask "mt_bench"

    def load(self, data_dir: Path) -> list[Question]:
        """Rows of <name>/question.jsonl."""
        path = base.find(data_dir, [f"{self.name}/question.jsonl"])
        fields = {"question_id": int, "category": str, "turns": list}
        rows = base.read_json_lines(path, path.read_text(encoding="utf-8"), fields)
        for row in rows:
            if not row["turns"] or not all(isinstance(turn, str) for turn in row["turns"]):
                raise ConfigError(
                    f"{path}: question {row['question_id']}: turns must be a list of texts"
                )
        return base.check_unique([self._question(row) for row in rows], path)

    def _question(self, row: dict[str, Any]) -> Question:
        category = row["category"]
        return Question(
            question_id=row["question_id"],
            category=category,
            subtask="mt_bench" if category in self.one_subtask else category,
            turns=tuple(row["turns"]),
        )

    def encode(
        self, model: specjax.LanguageModel, question: Question, answers: Sequence[str]
    ) -> list[int]:
        """The conversation so far, through the model's chat template."""
        system = base.prompt_text("safety_system.txt").removesuffix("\n")
        messages = [{"role": "system", "content": system}]
        for turn, answer in zip(question.turns, [*answers, None], strict=False):
            messages.append({"role": "user", "content": turn})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return model.encode({"messages": messages})

    def clean(self, text: str) -> str:
        """Without surrounding blanks; special tokens are not decoded in the first place."""
        return text.strip()

    def score(self, question: Question, answers: Sequence[str], execute: bool) -> dict[str, Any]:
        """Nothing: judging needs another model."""
        return {}


BENCHMARK = ChatBenchmark(name="mt_bench")
