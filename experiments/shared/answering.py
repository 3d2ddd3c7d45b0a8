"""Answering the questions of a benchmark, turn by turn, and the rows that become of it."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

import specjax
from experiments.benchmarks import Benchmark, Question
from experiments.shared import records

_MAX_TURNS = 16  # random streams per question


def digest(question: Question) -> str:
    """Tells whether an answer belongs to a question."""
    return hashlib.sha256(json.dumps(question.turns).encode()).hexdigest()[:16]


class Run:
    """A loaded model that answers questions.

    Args:
        model: loaded.
        drafter: built for it.
        benchmark: how to ask and to score.
        questions: all questions of the data; they number the random streams, so that limits change no answer.
        options: of `LanguageModel.generate`.
        config: goes into every row.
        execute: run code that the model writes, for its score.
        time_draft_prefill: run every prompt's pass once more without the drafter, to tell the drafter's share.
    """

    def __init__(
        self,
        model: specjax.LanguageModel,
        drafter: Any,
        benchmark: Benchmark,
        questions: Sequence[Question],
        options: dict[str, Any],
        config: dict[str, Any],
        execute: bool,
        time_draft_prefill: bool = False,
    ):
        self._model, self._drafter, self._benchmark = model, drafter, benchmark
        self._options, self._config, self._execute = options, config, execute
        self._time_draft_prefill = time_draft_prefill
        self._numbers = {q.question_id: number for number, q in enumerate(questions)}
        positions = model.config.max_position_embeddings
        self._max_length = min(options["max_length"] or positions, positions)

    def warm_up(self, question: Question, count: int) -> None:
        """Answers the first turn of a question `count` times, so that its programs are compiled and loaded."""
        for _ in range(count):
            self._turn([question], {question.question_id: _Answer()}, 0)

    def answer_all(self, todo: Sequence[Question], total: int, output: records.Records) -> None:
        """Answers questions in groups of the batch size and writes their rows, with a progress bar."""
        size = self._options["batch_size"]
        bar = tqdm(
            total=total, initial=total - len(todo), unit="question", disable=None, smoothing=0.1
        )
        tokens = steps = accepted = 0
        with bar, _resumable(output):
            for start in range(0, len(todo), size):
                group = todo[start : start + size]
                for question, answer in zip(group, self._answer(group), strict=True):
                    output.append(self._row(question, answer))
                    bar.update()
                    for result in answer.results:
                        tokens += result.metrics.new_tokens
                        steps += result.metrics.num_spec_steps
                        accepted += result.metrics.num_accepted_draft_tokens
                    length = f"{1 + accepted / max(steps, 1):.2f}"
                    bar.set_postfix(acceptance=length, tokens=tokens, refresh=False)

    def _answer(self, group: Sequence[Question]) -> list["_Answer"]:
        """Answers a group turn by turn."""
        found = {question.question_id: _Answer() for question in group}
        for turn in range(max(len(question.turns) for question in group)):
            self._turn(group, found, turn)
        return list(found.values())

    def _turn(self, group: Sequence[Question], found: dict[Any, "_Answer"], turn: int) -> None:
        """Adds the answers to one turn of those questions of a group that have it."""
        active, prompts = [], []
        for question in group:
            answer = found[question.question_id]
            if turn >= len(question.turns) or answer.error is not None:
                continue
            ids = self._benchmark.encode(self._model, question, answer.texts)
            if len(ids) >= self._max_length:
                answer.error = f"turn {turn}: the prompt has {len(ids)} tokens; max_length is {self._max_length}"
                continue
            active.append(question)
            prompts.append(ids)
        if not active:
            return
        streams = [self._numbers[q.question_id] * _MAX_TURNS + turn for q in active]
        results = self._model.generate_iter(
            prompts, self._drafter, request_ids=streams, **self._options
        )
        for index, result in sorted(results, key=lambda pair: pair[0]):
            answer = found[active[index].question_id]
            answer.results.append(result)
            answer.texts.append(self._benchmark.clean(result.text))
        if self._time_draft_prefill:
            short = self._options | {"max_new_tokens": 1, "stop": (), "trace": False}
            plain = dict(self._model.generate_iter(prompts, "none", request_ids=streams, **short))
            for index, question in enumerate(active):
                answer = found[question.question_id]
                with_draft = answer.results[-1].metrics.prefill_ms
                latency = (with_draft - plain[index].metrics.prefill_ms) / 1e3
                answer.draft_prefill_latency.append(latency)

    def _row(self, question: Question, answer: "_Answer") -> dict[str, Any]:
        """A row of the answer file."""
        row = {
            "id": question.question_id,
            "question_id": question.question_id,
            "category": question.category,
            "subtask": question.subtask,
            "answer_id": uuid.uuid4().hex,
            "model_id": self._config["run_name"],
            "choices": [_choice(answer)],
            "tstamp": time.time(),
            "question_digest": digest(question),
            "error": answer.error,
            "prompt_tokens": [len(result.input_ids) for result in answer.results],
            "output_ids": [result.output_ids for result in answer.results],
            "finish_reasons": [result.finish_reason for result in answer.results],
            "metrics": [_metrics(result) for result in answer.results],
        }
        if answer.error is None:
            row |= self._benchmark.score(question, answer.texts, self._execute)
        return row | {"config": self._config}


class _Answer:
    """What a model said to the turns of a question."""

    def __init__(self):
        self.results: list[specjax.GenerationResult] = []
        self.texts: list[str] = []
        self.error: str | None = None
        self.draft_prefill_latency: list[float] = []


def _choice(answer: _Answer) -> dict[str, Any]:
    """The answer in the reference's fields; times in seconds."""
    metrics = [result.metrics for result in answer.results]
    times = [each.decode_ms / 1e3 for each in metrics]
    fields = {
        "index": 0,
        "turns": answer.texts,
        "decoding_steps": [each.num_spec_steps for each in metrics],
        "new_tokens": [each.new_tokens for each in metrics],
        "wall_time": times,
        "accept_lengths": [length for each in metrics for length in _accept_lengths(each)],
        "generate_speed": [
            each.new_tokens / time_ if time_ > 0 else None
            for each, time_ in zip(metrics, times, strict=True)
        ],
    }
    inner = [each.inner_acceptance_histogram for each in metrics]
    if None not in inner:
        fields["cascade_accept_lengths"] = [length for each in inner for length in _lengths(each)]
    if answer.draft_prefill_latency:
        fields["draft_prefill_latency"] = answer.draft_prefill_latency
    return fields


def _accept_lengths(metrics: specjax.Metrics) -> list[int]:
    """Tokens of every step: in order where they were traced, else ascending."""
    if metrics.trace is not None:
        return [1 + len(step.accepted) for step in metrics.trace]
    return _lengths(metrics.acceptance_histogram)


def _lengths(histogram: Sequence[int]) -> list[int]:
    """Tokens of every step, ascending, from steps by number of accepted drafts."""
    return [1 + accepted for accepted, count in enumerate(histogram) for _ in range(count)]


def _metrics(result: specjax.GenerationResult) -> dict[str, Any]:
    """JSON-ready metrics without the steps, whose lengths are in `accept_lengths`."""
    return dataclasses.replace(result.metrics, trace=None).to_dict()


@contextlib.contextmanager
def _resumable(output: records.Records) -> Iterator[None]:
    """An interruption is told where to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nfinished rows are in {output.path}; the same command continues", file=sys.stderr)
        raise
