"""The endpoints that generate: one answer as a whole, or as a stream of server-sent events."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
from sse_starlette import EventSourceResponse
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from specjax.errors import RunnerClosedError, SpecjaxError
from specjax.serving.http import formats
from specjax.serving.http.errors import ApiError
from specjax.serving.http.generation import Delta, EngineFailedError, Generation
from specjax.serving.http.metrics import Metrics
from specjax.serving.http.requests import Prompts
from specjax.serving.http.settings import Settings
from specjax.serving.types import Request, Runner

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Service:
    """What all endpoints share.

    Attributes:
        runner: the engine.
        settings: of the server.
        prompts: reads bodies.
        metrics: of requests.
        pieces: tokens as text.
        ending: set when the server is told to end: streams then have `settings.drain_s` left.
        started: when, in seconds since the epoch.
        open: requests that the runner has and is not done with.
    """

    runner: Runner
    settings: Settings
    prompts: Prompts
    metrics: Metrics
    pieces: formats.Pieces
    ending: anyio.Event = field(default_factory=anyio.Event)
    started: int = field(default_factory=lambda: int(time.time()))
    open: int = 0

    def check_room(self, count: int) -> None:
        """Raises ApiError: 503 where nothing is taken any more, 429 where too many wait."""
        if self.runner.failure is not None or not self.runner.ready:
            raise ApiError(503, "the server takes no requests now", headers={"Retry-After": "5"})
        # Counted here: what the runner publishes is as old as its last look, and many may come between two.
        room = self.runner.limits.num_slots + self.settings.max_queue
        if count > room:
            raise ApiError(
                400, f"{count} choices of all prompts together: at most {room}", param="n"
            )
        if self.open + count > room:
            raise ApiError(
                429,
                f"{self.open} requests run or wait, of at most {room}",
                headers={"Retry-After": "1"},
                code="queue_full",
            )

    def close_one(self) -> None:
        """The runner is done with a request."""
        self.open -= 1


@dataclass(kw_only=True)
class Job:
    """The choices of one HTTP request: of each prompt `n`.

    Attributes:
        kind: "chat.completion" or "text_completion".
        body: as it was sent.
        requests: of all choices; those of one prompt stand together.
        stop: stop strings.
        identifier, created: of the answer.
    """

    kind: str
    body: Any
    requests: list[Request]
    stop: tuple[str, ...]
    identifier: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def frame(self, model: str, streamed: bool) -> dict[str, Any]:
        chat = self.kind == "chat.completion"
        name = f"{self.kind}.chunk" if chat and streamed else self.kind
        identifier = f"{'chatcmpl' if chat else 'cmpl'}-{self.identifier}"
        return {"id": identifier, "object": name, "created": self.created, "model": model}


def submit(service: Service, job: Job) -> list[Generation]:
    """Starts all choices, or none."""
    service.check_room(len(job.requests))
    started: list[Generation] = []
    try:
        for request in job.requests:
            tokenizer = service.prompts.tokenizer
            started.append(
                Generation(service.runner, request, tokenizer, job.stop, service.close_one)
            )
            service.open += 1
    except RunnerClosedError as error:
        _cancel(started)
        raise ApiError(503, str(error), headers={"Retry-After": "5"}) from error
    except SpecjaxError as error:
        _cancel(started)
        raise ApiError(400, str(error), code="invalid_value") from error
    return started


def _cancel(generations: list[Generation]) -> None:
    for generation in generations:
        generation.cancel()


async def whole(
    service: Service, http: HttpRequest, job: Job, choice: Callable[[int, list[Delta]], dict]
) -> Response:
    """One answer; a client that goes away frees its slots."""
    generations = submit(service, job)
    gone = asyncio.ensure_future(_until_gone(http))
    work = asyncio.ensure_future(_all(service, generations))
    try:
        await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)
        found = work.result()
    except EngineFailedError as error:
        raise ApiError(500, f"the engine failed: {error}") from error
    finally:
        _cancel(generations)
        for task in (gone, work):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineFailedError):
                await task
    answer = job.frame(service.settings.model_name, False)
    answer["choices"] = [choice(index, deltas) for index, deltas in enumerate(found)]
    ends = [deltas[-1].statistics for deltas in found]
    answer["usage"] = _usage(job, ends)
    return JSONResponse(answer)


def _usage(job: Job, ends: list) -> dict[str, Any]:
    n = job.body.n
    groups = [ends[begin : begin + n] for begin in range(0, len(ends), n)]
    return formats.summed(formats.usage(group) for group in groups)


async def _until_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _all(service: Service, generations: list[Generation]) -> list[list[Delta]]:
    async def read(generation: Generation) -> list[Delta]:
        return [delta async for delta in _timed(service, generation)]

    return await asyncio.gather(*(read(generation) for generation in generations))


async def _timed(service: Service, generation: Generation) -> AsyncIterator[Delta]:
    """The deltas, measured."""
    begin = last = time.monotonic()
    first = True
    async for delta in generation.deltas():
        now = time.monotonic()
        if delta.tokens:
            service.metrics.piece(now - last, first)
            first, last = False, now
        if delta.finish_reason is not None:
            service.metrics.finished(delta.statistics, now - begin)
        yield delta


def stream(
    service: Service, job: Job, choice: Callable[[int, Delta, bool], list[dict]]
) -> Response:
    """Server-sent events; `choice` gives the pieces of a choice from a delta, told whether it is the first."""
    generations = submit(service, job)
    frame = job.frame(service.settings.model_name, True)
    options = job.body.stream_options
    return _Stream(
        generations,
        _events(service, job, generations, choice, frame, options),
        ping=15,
        send_timeout=service.settings.send_timeout_s,
        shutdown_event=service.ending,
        shutdown_grace_period=service.settings.drain_s,
        headers={"X-Accel-Buffering": "no"},
    )


class _Stream(EventSourceResponse):
    """Frees the slots however it ends: a client may go before the first event is asked for."""

    def __init__(self, generations: list[Generation], *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._generations = generations

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._generations)


async def _events(service, job, generations, choice, frame, options) -> AsyncIterator[dict]:
    ends: dict[int, Any] = {}
    wants_usage = options is not None and options.include_usage
    try:
        async for index, delta, first in _interleaved(service, generations):
            for piece in choice(index, delta, first):
                found = frame | {"choices": [piece]}
                if wants_usage:
                    found["usage"] = None
                if options is not None and options.continuous_usage_stats:
                    found["usage"] = formats.usage([delta.statistics])
                yield {"data": _dumped(found)}
            if delta.finish_reason is not None:
                ends[index] = delta.statistics
        if wants_usage:
            statistics = [ends[index] for index in sorted(ends)]
            yield {"data": _dumped(frame | {"choices": [], "usage": _usage(job, statistics)})}
        yield {"data": "[DONE]"}
    except EngineFailedError as error:
        yield {"data": _dumped(ApiError(500, f"the engine failed: {error}").body())}
    except Exception as error:
        # Neither the log nor the answer has anything of the prompt.
        _log.error("a stream failed: %s", type(error).__name__)
        yield {"data": _dumped(ApiError(500, f"the server failed: {type(error).__name__}").body())}
    finally:
        _cancel(generations)


async def _interleaved(service, generations) -> AsyncIterator[tuple[int, Delta, bool]]:
    """(choice, delta, whether it is the choice's first), as they come."""
    queue: asyncio.Queue = asyncio.Queue()

    async def read(index: int, generation: Generation) -> None:
        try:
            async for delta in _timed(service, generation):
                queue.put_nowait((index, delta))
            queue.put_nowait((index, None))
        except EngineFailedError as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(read(i, g)) for i, g in enumerate(generations)]
    seen: set[int] = set()
    left = len(tasks)
    try:
        while left:
            index, found = await queue.get()
            if found is None:
                left -= 1
            elif isinstance(found, EngineFailedError):
                raise found
            else:
                yield index, found, index not in seen
                seen.add(index)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _dumped(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
