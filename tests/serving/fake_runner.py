"""A runner without an engine: tokens are scripted, one per tick; cancels, deadlines and failures as of the real one."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from specjax.errors import RunnerClosedError
from specjax.serving.checks import check
from specjax.serving.types import (
    Callback,
    Event,
    Limits,
    Request,
    RunnerStats,
    Statistics,
    TokenLogprob,
)

Script = Callable[[Request], Sequence[int]]


class FakeRunner:
    """Implements `specjax.serving.types.Runner`.

    Args:
        script: the tokens of a request, which end it by `max_tokens` or by a stop id among them; the last one repeats.
        tick_s: seconds between pieces.
        piece: tokens of a piece.
        limits: what it takes.
    """

    def __init__(self, script: Script, *, limits: Limits, tick_s: float = 0.0, piece: int = 1):
        self.limits, self._script, self._tick_s, self._piece = limits, script, tick_s, piece
        self.seen: list[Request] = []
        self.ended: dict[str, str] = {}
        self._lock = threading.Condition()
        self._jobs: dict[str, tuple[Request, Callback]] = {}
        self._cancelled: set[str] = set()
        self._failure: BaseException | None = None
        self._listeners: list[Callable[[BaseException], None]] = []
        self._draining = False
        self._totals: Counter = Counter()
        self._slots = threading.Semaphore(limits.num_slots)

    @property
    def ready(self) -> bool:
        return not self._draining and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    def submit(self, request: Request, callback: Callback) -> None:
        check(request, self.limits)
        with self._lock:
            if not self.ready:
                raise RunnerClosedError("the runner takes no more requests")
            self.seen.append(request)
            self._jobs[request.request_id] = (request, callback)
        threading.Thread(target=self._run, args=(request, callback), daemon=True).start()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._jobs:
                self._cancelled.add(request_id)
            self._lock.notify_all()

    def stats(self) -> RunnerStats:
        with self._lock:
            running = min(len(self._jobs), self.limits.num_slots)
            return RunnerStats(
                running=running,
                waiting=len(self._jobs) - running,
                finished=dict(Counter(self.ended.values())),
                prompt_tokens=self._totals["prompt"],
                generation_tokens=self._totals["new"],
                num_drafts=self._totals["new"],
                num_draft_tokens=2 * self._totals["new"],
                acceptance_histogram=(0, self._totals["new"], 0),
            )

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        self._listeners.append(callback)

    def drain(self, timeout_s: float | None = None) -> bool:
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._jobs, timeout_s)

    def close(self) -> None:
        with self._lock:
            self._draining = True
            self._cancelled.update(self._jobs)
            self._lock.notify_all()
        self.drain(5)

    def fail(self, error: BaseException) -> None:
        """The engine fails now."""
        with self._lock:
            self._failure = error
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self._jobs, 5)
        for listener in self._listeners:
            listener(error)

    def idle(self, timeout_s: float = 5.0) -> bool:
        """Waits until no request is left."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._jobs, timeout_s)

    def _run(self, request: Request, callback: Callback) -> None:
        with self._slots:
            self._generate(request, callback)

    def _generate(self, request: Request, callback: Callback) -> None:
        script, done = list(self._script(request)), 0
        reason = error = None
        while reason is None:
            tokens = []
            while len(tokens) < self._piece and reason is None:
                tokens.append(script[min(done + len(tokens), len(script) - 1)])
                if tokens[-1] in request.stop_ids:
                    reason = "stop"
                elif done + len(tokens) == request.max_tokens:
                    reason = "length"
            with self._lock:
                wake = lambda: self._failure or request.request_id in self._cancelled
                if self._lock.wait_for(wake, self._tick_s):
                    tokens, error = [], self._failure
                    reason = "error" if error else "cancelled"
                elif request.deadline is not None and time.monotonic() >= request.deadline:
                    tokens, reason = [], "deadline"
                self._totals["new"] += len(tokens)
                self._totals["prompt"] += 0 if done else len(request.prompt_ids)
            prompt = self._scored(request.prompt_ids[1:], request.prompt_logprobs)
            first, done = not done, done + len(tokens)
            if reason is not None:
                self._forget(request, reason)
            callback(
                Event(
                    request_id=request.request_id,
                    tokens=tuple(tokens),
                    drafted=(False,) + (True,) * (len(tokens) - 1) if tokens else (),
                    logprobs=self._scored(tokens, request.logprobs),
                    prompt_logprobs=prompt if first and tokens else (),
                    statistics=Statistics(
                        prompt_tokens=len(request.prompt_ids),
                        new_tokens=done,
                        num_spec_steps=done,
                        num_draft_tokens=2 * done,
                        acceptance_histogram=(0, done, 0),
                        queue_s=0.0,
                        prefill_s=0.0,
                        decode_s=0.001,
                    ),
                    finish_reason=reason,
                    error=error,
                )
            )

    def _forget(self, request: Request, reason: str) -> None:
        with self._lock:
            self._jobs.pop(request.request_id)
            self._cancelled.discard(request.request_id)
            self.ended[request.request_id] = reason
            self._lock.notify_all()

    def _scored(self, tokens: Sequence[int], top: int | None) -> tuple[TokenLogprob, ...]:
        """Made-up figures: the chosen token is the most likely one."""
        if top is None:
            return ()
        size = self.limits.vocab_size
        return tuple(
            TokenLogprob(
                token=token,
                logprob=-0.5,
                top=tuple(((token + rank) % size, -0.5 - rank) for rank in range(top)),
            )
            for token in tokens
        )
