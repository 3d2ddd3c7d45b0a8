"""One text while it is generated: events of the engine's thread, as pieces of text in the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from specjax.serving.types import Event, Request, Runner, Statistics, TokenLogprob
from specjax.text.transcript import Transcript


@dataclass(frozen=True, kw_only=True)
class Delta:
    """News of one text.

    Attributes:
        text: what is new and stays: no half characters, no possible beginning of a stop string.
        tokens, drafted, logprobs: as in `Event`, up to a stop string.
        prompt_logprobs: on the first one, where asked for.
        finish_reason: "stop" or "length" on the last one.
        stopped_by: "deadline" or "cancelled" (the server ends), where it was that.
        statistics: so far; `new_tokens` counts those that are handed out here.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    drafted: tuple[bool, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stopped_by: str | None = None
    statistics: Statistics


class EngineFailedError(Exception):
    """The engine failed; the server is about to end."""


class Generation:
    """Submits a request at once, and yields what becomes of it.

    Args:
        runner: the engine.
        request: what to do.
        tokenizer: for the text, or None: tokens only.
        stop: stop strings.
        ended: called in the event loop once the runner is done with the request.
    """

    def __init__(
        self,
        runner: Runner,
        request: Request,
        tokenizer,
        stop: Sequence[str] = (),
        ended: Callable[[], None] = lambda: None,
    ):
        self._runner, self.request = runner, request
        self._transcript = None
        if tokenizer is not None:
            self._transcript = Transcript(tokenizer, list(request.prompt_ids), stop)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._tokens: list[int] = []
        self._done = False
        loop = asyncio.get_running_loop()

        def arrive(event: Event) -> None:
            # Together: who has seen the last event finds the request ended.
            if event.finish_reason is not None:
                ended()
            self._events.put_nowait(event)

        def tell(event: Event) -> None:
            # The loop may have ended: then nobody listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(arrive, event)

        runner.submit(request, tell)

    def cancel(self) -> None:
        """Frees the slot, unless the text has ended."""
        if not self._done:
            self._runner.cancel(self.request.request_id)

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, until the end.

        Raises:
            EngineFailedError: the engine has.
        """
        try:
            while not self._done:
                event = await self._events.get()
                # What has come meanwhile goes out together: a slow reader gets larger pieces, not a longer queue.
                events = [event]
                while events[-1].finish_reason is None and not self._events.empty():
                    events.append(self._events.get_nowait())
                delta = self._delta(events)
                if delta is not None:
                    yield delta
        finally:
            self.cancel()

    def _delta(self, events: Sequence[Event]) -> Delta | None:
        last = events[-1]
        if last.finish_reason == "error":
            self._done = True
            raise EngineFailedError(str(last.error)) from last.error
        new = [token for event in events for token in event.tokens]
        before = len(self._tokens)
        self._tokens += new
        keep, text, reason = None, "", last.finish_reason
        if self._transcript is not None:
            keep = self._transcript.read(self._tokens)
            text = self._transcript.piece()
        if keep is not None:
            self.cancel()
            reason = "stop"
        if reason is not None:
            self._done = True
            kept = self._tokens if keep is None else self._tokens[:keep]
            text += self._transcript.finish(kept) if self._transcript is not None else ""
        count = len(new) if keep is None else max(keep - before, 0)
        if not new and reason is None:
            return None
        joined = {
            name: tuple(value for event in events for value in getattr(event, name))
            for name in ("drafted", "logprobs", "prompt_logprobs")
        }
        return Delta(
            text=text,
            tokens=tuple(new[:count]),
            drafted=joined["drafted"][:count],
            logprobs=joined["logprobs"][:count],
            prompt_logprobs=joined["prompt_logprobs"],
            finish_reason={None: None, "stop": "stop"}.get(reason, "length"),
            stopped_by=reason if reason in ("deadline", "cancelled") else None,
            statistics=replace(last.statistics, new_tokens=before + count),
        )
