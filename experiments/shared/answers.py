"""Answer files: what a row of `experiments.evaluate` says, and the reference's way of summing rows up."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]


def choice(row: Row) -> Row:
    """The answer of a row; there is one per question."""
    return row["choices"][0]


def answered(rows: Sequence[Row]) -> list[Row]:
    """Rows whose every turn was answered, with time spent on decoding."""
    return [row for row in rows if row.get("error") is None and sum(choice(row)["wall_time"]) > 0]


def speed(row: Row) -> float:
    """New tokens per second of decoding over all turns of a question; prompts are not counted as time."""
    return sum(choice(row)["new_tokens"]) / sum(choice(row)["wall_time"])


def mean_speed(rows: Sequence[Row]) -> float:
    """Unweighted mean of the questions' speeds, as the reference reports it."""
    return float(np.mean([speed(row) for row in rows]))


def accept_lengths(rows: Sequence[Row]) -> list[int]:
    """Tokens per target step, the bonus token included, over all questions."""
    return [length for row in rows for length in choice(row)["accept_lengths"]]


def mean_accepted(rows: Sequence[Row]) -> float | None:
    """Mean over all steps of all questions; None without steps."""
    lengths = accept_lengths(rows)
    return float(np.mean(lengths)) if lengths else None


def accuracy(rows: Sequence[Row]) -> tuple[int, int] | None:
    """Right answers and scored ones; None where none was scored."""
    scored = [row["correct"] for row in rows if row.get("correct") is not None]
    return (sum(scored), len(scored)) if scored else None


def seconds(rows: Sequence[Row], name: str) -> float:
    """Sum of a metric in milliseconds ("prefill_ms", "decode_ms", "compile_ms") over all turns, in seconds."""
    return sum(turn[name] for row in rows for turn in row["metrics"]) / 1e3
