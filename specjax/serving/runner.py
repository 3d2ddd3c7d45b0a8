"""One thread owns the engine: requests come in through a queue, events go out through callbacks.

A piece is dispatched before the one before it is read, so the host's work and the callers' hides behind the device's.
"""

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

import jax
import numpy as np

from specjax.engine.slot_engine import SlotEngine
from specjax.engine.slots import Piece
from specjax.errors import ConfigError, RunnerClosedError
from specjax.serving.checks import check
from specjax.serving.job import Job
from specjax.serving.scheduler import Plan, Policy, Scheduler
from specjax.serving.types import Callback, Event, Limits, Request, RunnerStats

_LOG = logging.getLogger(__name__)
_CLOSE = object()
_LEARNED = 0.2  # weight of the newest piece in the mean time of a step


class EngineRunner:
    """Runs requests on a `SlotEngine`; see `specjax.serving.types.Runner` for what callers rely on.

    Args:
        engine: the slots; nobody else may use them from now on.
        policy: how requests share them; its widths and steps must be those of the engine. Default: they are.
        piece_s: seconds that a piece shall take while nobody waits.
        clock: gives seconds; deadlines are times of it.
    """

    def __init__(
        self,
        engine: SlotEngine,
        *,
        vocab_size: int,
        policy: Policy | None = None,
        piece_s: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ):
        options = engine.options
        self.limits = Limits(
            num_slots=options.num_slots,
            max_model_len=options.max_model_len,
            vocab_size=vocab_size,
            max_logprobs=options.max_logprobs,
            prompt_logprobs=options.prompt_logprobs,
            max_stop_ids=options.max_stop_ids,
            max_logit_bias=options.max_biased,
        )
        widths, most = options.widths, options.max_steps
        policy = policy or Policy(widths=widths, prefill_budget=widths[-1], max_steps=most)
        if policy.widths != widths or policy.max_steps > most:
            raise ConfigError(
                f"policy: widths={policy.widths}, max_steps={policy.max_steps}; the engine's are {widths} and {most}"
            )
        self._engine, self._clock, self._piece_s = engine, clock, piece_s
        self._scheduler = Scheduler(options.num_slots, policy)
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._jobs: dict[str, Job] = {}
        self._unread: deque[tuple[dict[int, Job], Piece, int]] = deque()
        self._step_s: float | None = None
        self._last_read: float | None = None
        self._totals: Counter = Counter()
        self._finished: Counter = Counter()
        self._histogram = np.zeros(engine.path_rows, np.int64)
        self._stats = RunnerStats()
        # What other threads see, under the lock: the ids that are accepted, and the state of the runner.
        self._lock = threading.Condition()
        self._known: set[str] = set()
        self._listeners: list[Callable[[BaseException], None]] = []
        self._failure: BaseException | None = None
        self._warm = self._draining = False
        self._thread = threading.Thread(target=self._run, name="specjax-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which warms up first."""
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Waits for the warm-up; False if it has not ended by then.

        Raises:
            BaseException: what made it fail.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._warm or self._failure is not None, timeout_s)
            if self._failure is not None:
                raise self._failure
            return self._warm

    @property
    def ready(self) -> bool:
        with self._lock:
            return self._warm and not self._draining and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        with self._lock:
            return self._failure

    def submit(self, request: Request, callback: Callback) -> None:
        check(request, self.limits)
        job = Job(request=request, callback=callback, submitted=self._clock())
        with self._lock:
            if self._failure is not None:
                raise RunnerClosedError(f"the engine has failed: {self._failure!r}")
            if self._draining:
                raise RunnerClosedError("the runner takes no more requests: it is shutting down")
            if request.request_id in self._known:
                raise ConfigError(
                    f"request_id={request.request_id!r}: is waiting or running already"
                )
            self._known.add(request.request_id)
            self._inbox.put(job)

    def cancel(self, request_id: str) -> None:
        self._inbox.put(request_id)

    def stats(self) -> RunnerStats:
        return self._stats

    def on_failure(self, callback: Callable[[BaseException], None]) -> None:
        with self._lock:
            if self._failure is None:
                self._listeners.append(callback)
                return
        callback(self._failure)

    def drain(self, timeout_s: float | None = None) -> bool:
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: not self._known, timeout_s)

    def close(self) -> None:
        with self._lock:
            self._draining = True
        if self._thread.ident is None:  # never started: nobody else would end what was submitted
            self._end_all("cancelled", None)
        self._inbox.put(_CLOSE)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._engine.warm_up()
            self._publish()
            with self._lock:
                self._warm = True
                self._lock.notify_all()
            while self._receive():
                self._look()
            self._end_all("cancelled", None)
        except (
            BaseException
        ) as error:  # whoever waits for an answer must hear of it, whatever it is
            self._fail(error)

    def _receive(self) -> bool:
        """Takes messages in; waits for one while there is nothing to do. False: the runner is to close."""
        timeout = 0.0 if self._busy() else None
        while True:
            try:
                message = self._inbox.get(timeout != 0, timeout)
            except queue.Empty:
                return True
            timeout = 0.0
            if message is _CLOSE:
                return False
            if isinstance(message, Job):
                self._jobs[message.request.request_id] = message
                self._scheduler.submit(message.request)
            else:
                self._scheduler.cancel(message)

    def _busy(self) -> bool:
        return bool(self._jobs or self._unread)

    def _look(self) -> None:
        """One plan: applied, its piece dispatched, and the piece before it read."""
        begin = self._clock()
        plan = self._scheduler.plan(begin, self._steps())
        self._apply(plan, begin)
        if plan.owners:
            piece = self._engine.decode(plan.steps, plan.greedy)
            owners = {i: self._jobs[r.request_id] for i, r in plan.owners.items()}
            # The time of prompts is not that of steps: nothing is learned from such a piece.
            self._unread.append((owners, piece, 0 if plan.chunks else plan.steps))
        waited = 0.0
        if plan.chunks and not plan.owners:
            waited += self._wait()
        while len(self._unread) > bool(plan.owners):
            waited += self._read(*self._unread.popleft())
        end = self._clock()
        self._totals["look_s"] += end - begin
        self._totals["host_s"] += end - begin - waited
        self._publish()

    def _wait(self) -> float:
        """Waits for the device, so that prompts are not dispatched far ahead of a cancel; returns the seconds."""
        begin = self._clock()
        self._engine.wait()
        return self._clock() - begin

    def _steps(self) -> int:
        """As many steps as fit a piece's time; one while that is not known."""
        return max(1, int(self._piece_s / self._step_s)) if self._step_s else 1

    def _apply(self, plan: Plan, now: float) -> None:
        """Does what a plan says, up to its piece."""
        slots = [ended.slot for ended in plan.ended if ended.slot is not None]
        if slots:
            self._engine.release(slots)
        for ended in plan.ended:
            job = self._jobs[ended.request.request_id]
            self._finish(job, job.last_event(ended.reason, now))
        for admission in plan.admissions:
            job = self._jobs[admission.request.request_id]
            job.admitted, job.cached = now, admission.cached
            self._totals["prompt_tokens"] += len(job.request.prompt_ids)
            self._totals["cached_tokens"] += job.cached
            if admission.donor is not None:
                self._engine.copy(admission.donor, admission.slot)
        for chunk in plan.chunks:
            job = self._jobs[chunk.request.request_id]
            scores = self._engine.take_in(
                chunk.slot,
                job.slot_request(),
                chunk.begin,
                chunk.width,
                begins=chunk.first,
                score=chunk.request.prompt_logprobs is not None,
            )
            if scores is not None:
                job.scores.append((chunk.begin, scores))

    def _read(self, owners: dict[int, Job], piece: Piece, steps: int) -> float:
        """Hands out what a piece added; returns the seconds that were spent waiting for the device."""
        begin = self._clock()
        piece = jax.device_get(piece)
        now = self._clock()
        self._learn(now, steps)
        self._totals["num_looks"] += 1
        for slot, job in owners.items():
            if self._jobs.get(job.request.request_id) is not job:
                continue  # it ended meanwhile
            event = job.read(piece, slot, now)
            if event is None:
                continue
            done = event.finish_reason is not None
            self._scheduler.advance(slot, job.request, event.tokens, done)
            self._totals["generation_tokens"] += len(event.tokens)
            self._finish(job, event) if done else self._tell(job, event)
        return now - begin

    def _learn(self, now: float, steps: int) -> None:
        """Learns what a step takes from pieces that were read one after the other."""
        if self._last_read is not None and steps:
            taken = (now - self._last_read) / steps
            old = taken if self._step_s is None else self._step_s
            self._step_s = old + _LEARNED * (taken - old)
        self._last_read = now if self._unread else None

    def _finish(self, job: Job, event: Event) -> None:
        """Sends a request's last event and forgets the request."""
        del self._jobs[job.request.request_id]
        self._finished[event.finish_reason] += 1
        self._totals["num_spec_steps"] += job.num_spec_steps
        self._totals["num_draft_tokens"] += job.num_draft_tokens
        if job.histogram:
            self._histogram += job.histogram
        self._tell(job, event)
        self._publish()  # before `drain` hears of it, whose caller may read the counters
        with self._lock:
            self._known.discard(job.request.request_id)
            self._lock.notify_all()

    def _tell(self, job: Job, event: Event) -> None:
        try:
            job.callback(event)
        except Exception:  # one caller's fault is no other's
            _LOG.exception("callback of request %r", job.request.request_id)
            self._scheduler.cancel(job.request.request_id)

    def _end_all(self, reason, error: BaseException | None) -> None:
        """Ends every request, those in the inbox too."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, Job):
                self._jobs[message.request.request_id] = message
        now = self._clock()
        for job in list(self._jobs.values()):
            self._finish(job, job.last_event(reason, now, error))
        self._publish()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
            listeners = list(self._listeners)
            self._lock.notify_all()
        _LOG.error("the engine has failed", exc_info=error)
        self._end_all("error", error)
        for listener in listeners:
            listener(error)

    def _publish(self) -> None:
        """A snapshot of the counters, replaced as a whole."""
        jobs, totals = self._jobs.values(), self._totals
        histogram = self._histogram.copy()
        for job in jobs:
            if job.histogram:
                histogram += job.histogram
        running = sum(job.admitted is not None for job in jobs)
        positions = self.limits.num_slots * self.limits.max_model_len
        self._stats = RunnerStats(
            running=running,
            waiting=len(jobs) - running,
            kv_usage=self._scheduler.num_positions / positions,
            finished=dict(self._finished),
            prompt_tokens=totals["prompt_tokens"],
            cached_tokens=totals["cached_tokens"],
            generation_tokens=totals["generation_tokens"],
            num_drafts=totals["num_spec_steps"] + sum(job.num_spec_steps for job in jobs),
            num_draft_tokens=totals["num_draft_tokens"] + sum(j.num_draft_tokens for j in jobs),
            acceptance_histogram=tuple(histogram.tolist()),
            num_compilations=self._engine.num_compilations,
            num_looks=totals["num_looks"],
            look_s=totals["look_s"],
            host_s=totals["host_s"],
        )
