"""The serving process: starts the engine and the socket, ends both in order."""

import asyncio
import logging
import socket
import threading
from typing import Any

import uvicorn

from specjax.errors import ConfigError
from specjax.serving.http import app, formats
from specjax.serving.http.endpoints import Service
from specjax.serving.http.metrics import Metrics
from specjax.serving.http.requests import Prompts
from specjax.serving.http.settings import Settings
from specjax.serving.types import Runner
from specjax.text import tokenizer as tokenizers

_log = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "::1")


def service(model: Any, runner: Runner, settings: Settings) -> Service:
    """What the endpoints of a loaded model share."""
    known = tokenizers.usable(model.tokenizer)
    prompts = Prompts(
        known,
        model.stop_ids,
        runner.limits,
        settings.default_temperature,
        settings.request_timeout_s,
    )
    return Service(
        runner=runner,
        settings=settings,
        prompts=prompts,
        metrics=Metrics(settings.model_name, runner.stats),
        pieces=formats.Pieces(known),
    )


class _Server(uvicorn.Server):
    """Tells streams how long they have before they are cut."""

    def __init__(self, config: uvicorn.Config, ours: Service):
        super().__init__(config)
        self._ours = ours

    def handle_exit(self, sig, frame) -> None:
        self._ours.ending.set()
        # In a thread: it waits for requests that the event loop has to serve.
        threading.Thread(target=self._ours.runner.drain, args=(0.0,), daemon=True).start()
        super().handle_exit(sig, frame)
        # An end that was asked for is a good one: uvicorn would raise the signal again, behind it.
        self._captured_signals.clear()


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, on which nothing is listened for yet; port 0: one that is free.

    Raises:
        ConfigError: the address is not one of this machine, or is taken.
    """
    try:
        kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(kind, socket.SOCK_STREAM)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host={host!r}, port={port}: cannot listen there ({error}); choose another --host or --port"
        ) from error
    return found


def serve(ours: Service, place: socket.socket) -> BaseException | None:
    """Serves at a bound socket, see `bind`, until the process is told to end or the engine fails; what it failed of.

    SIGTERM and SIGINT: nothing new is taken, what runs is finished within `Settings.drain_s`.
    """
    host = place.getsockname()[0]
    if host not in _LOOPBACK and not ours.settings.api_keys:
        _log.warning("%s is open to others and there is no API key: anybody may use it", host)
    config = uvicorn.Config(
        app.create(ours),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(ours.settings.drain_s) + 1,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config, ours)

    def fail(error: BaseException) -> None:
        _log.error("the engine failed, the server ends: %s: %s", type(error).__name__, error)
        server.should_exit = True

    ours.runner.on_failure(fail)
    try:
        asyncio.run(server.serve([place]))
    finally:
        ours.runner.close()
    return ours.runner.failure
