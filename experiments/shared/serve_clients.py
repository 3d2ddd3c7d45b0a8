"""Clients that time a server's streams: in the server's own process, and over a socket."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import uvicorn

from specjax.serving.http import process

_PATH = "/v1/completions"


@dataclass(kw_only=True)
class Timeline:
    """When the pieces of a stream came, in seconds of one clock.

    Attributes:
        begin: of the request.
        pieces: (time, number of tokens) of each.
    """

    begin: float = field(default_factory=time.perf_counter)
    pieces: list[tuple[float, int]] = field(default_factory=list)

    def line(self, line: str) -> None:
        """Takes a line of the stream.

        Raises:
            RuntimeError: the server says that something failed.
        """
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        found = json.loads(line[6:])
        if "error" in found:
            raise RuntimeError(f"the server refused: {found['error']['message']}")
        count = sum(len(choice["token_ids"]) for choice in found["choices"])
        if count:
            self.pieces.append((time.perf_counter(), count))

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.pieces)

    @property
    def ttft_s(self) -> float:
        return self.pieces[0][0] - self.begin

    @property
    def per_token_s(self) -> float:
        """Between the first piece and the last, per token; 0 where all came at once."""
        behind = self.tokens - self.pieces[0][1]
        return (self.pieces[-1][0] - self.pieces[0][0]) / max(behind, 1)

    @property
    def longest_gap_s(self) -> float:
        times = [when for when, _ in self.pieces]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


Ask = Callable[[dict[str, Any]], Awaitable[Timeline]]


def in_process(app) -> Ask:
    """Calls an ASGI application as a server would, without one."""

    async def ask(body: dict[str, Any]) -> Timeline:
        found, buffer = Timeline(), [b""]
        incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> dict:
            if not incoming:
                # Who listens for the end of the connection is cancelled with the stream.
                await anyio.sleep_forever()
            return incoming.pop()

        async def send(message: dict) -> None:
            *lines, buffer[0] = (buffer[0] + message.get("body", b"")).split(b"\n")
            for line in lines:
                found.line(line.decode().strip())
            if message["type"] == "http.response.start" and message["status"] != 200:
                raise RuntimeError(f"the server refused with status {message['status']}")

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": _PATH, "raw_path": _PATH.encode()}
        scope |= {"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http"}
        scope |= {"server": ("bench", 80), "client": ("bench", 1), "root_path": ""}
        await app(scope, receive, send)
        return found

    return ask


def over_socket(url: str) -> Ask:
    """Asks a server that listens."""

    async def ask(body: dict[str, Any]) -> Timeline:
        found = Timeline()
        async with (
            httpx.AsyncClient(timeout=None) as client,
            client.stream("POST", url + _PATH, json=body) as response,
        ):
            if response.status_code != 200:
                raise RuntimeError(f"the server refused: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                found.line(line)
        return found

    return ask


@contextlib.contextmanager
def listening(app) -> Iterator[str]:
    """An application behind a socket of this machine, in a thread; its URL."""
    place = process.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([place],), daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        place.close()


@contextlib.contextmanager
def connected(app, transport: str) -> Iterator[Ask]:
    """A client of an application: "asgi", in process, or "socket"."""
    if transport == "asgi":
        yield in_process(app)
        return
    with listening(app) as url:
        yield over_socket(url)
