"""What clients do wrong is answered by a 4xx that names it, limits hold within one look, and SIGTERM ends in order."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import httpx
import pytest

from specjax.errors import ConfigError
from specjax.serving import checks
from specjax.serving.http import app, process
from specjax.serving.http.body import read_json
from specjax.serving.http.errors import ApiError
from specjax.serving.http.settings import Settings
from specjax.serving.types import Event, Limits, RunnerStats, Statistics
from specjax.text import tokenizer as tokenizers
from tests import paths

LIMITS = Limits(
    num_slots=2, max_model_len=256, vocab_size=300, max_logprobs=5, prompt_logprobs=True
)
DIGITS = "9" * 5000


class Scripted:
    """A runner whose every answer is the same tokens; `held` requests end when they are cancelled.

    Attributes:
        tokens: of every answer.
        pause_s: before each of them; 0: they come as one, at once.
        held: nothing comes.
        closed: whether somebody closed it.
    """

    limits, failure, ready = LIMITS, None, True

    def __init__(self, tokens=(5, 6, 7), pause_s=0.0, held=False):
        self.tokens, self.pause_s, self.held = tuple(tokens), pause_s, held
        self.callbacks, self.closed = {}, False

    def submit(self, request, callback):
        checks.check(request, self.limits)
        self.callbacks[request.request_id] = callback
        if self.pause_s:
            threading.Thread(target=self._slowly, args=(request,), daemon=True).start()
        elif not self.held:
            self._tell(request.request_id, self.tokens, len(self.tokens), "length")

    def _slowly(self, request):
        for count, token in enumerate(self.tokens, 1):
            time.sleep(self.pause_s)
            done = "length" if count == len(self.tokens) else None
            self._tell(request.request_id, (token,), count, done)

    def _tell(self, name, tokens, count, reason):
        statistics = Statistics(prompt_tokens=1, new_tokens=count)
        drafted = (False,) * len(tokens)
        event = Event(
            request_id=name,
            tokens=tokens,
            drafted=drafted,
            statistics=statistics,
            finish_reason=reason,
        )
        if name in self.callbacks:
            self.callbacks[name](event)
        if reason is not None:
            self.callbacks.pop(name, None)

    def cancel(self, name):
        self._tell(name, (), 0, "cancelled")

    def stats(self):
        return RunnerStats()  # as before the first look: the limits may not rest on it

    def on_failure(self, callback):
        pass

    def drain(self, timeout_s=None):
        return True

    def close(self):
        self.closed = True


def service(runner, with_text=True, **settings):
    folder = paths.COPIED / "checkpoints" / "tiny-fp16"
    model = SimpleNamespace(
        tokenizer=tokenizers.from_directory(folder) if with_text else None, stop_ids=()
    )
    return process.service(model, runner, Settings(model_name="m", **settings))


def client(ours):
    transport = httpx.ASGITransport(app.create(ours), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://here")


def post(ours, body, path="/v1/completions"):
    async def ask():
        async with client(ours) as http:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await http.post(path, content=content)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "body, named",
    [
        (b'{"prompt":"a","\\ud800":1}', "ud800"),
        ({"prompt": [10**13]}, "prompt has"),
        ({"prompt": [-1]}, "prompt has the token -1"),
        ({"prompt": [[5], [300]]}, "prompt has the token 300"),
        ({"prompt": "a", "logit_bias": {DIGITS: 1}}, "logit_bias"),
        ({"prompt": "a", "temperature": "0.5"}, "temperature"),
        ({"prompt": "a", "top_p": True}, "top_p"),
        ({"prompt": ["a"] * 200}, "200 choices"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_body_is_refused_by_name(body, named, stream):
    if stream and isinstance(body, dict):
        body = body | {"stream": True}
    answer = post(service(Scripted()), body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"].lower()


def test_the_queue_is_limited_between_two_looks_too():
    runner = Scripted(held=True)
    ours = service(runner, max_queue=1)

    async def ask():
        async with client(ours) as http:
            waiting = [
                asyncio.ensure_future(http.post("/v1/completions", json={"prompt": [5]}))
                for _ in range(3)
            ]
            while len(runner.callbacks) < 3:
                await asyncio.sleep(0.001)
            refused = await http.post("/v1/completions", json={"prompt": [5]})
            for name in list(runner.callbacks):
                runner.cancel(name)
            await asyncio.gather(*waiting)
            runner.held = False
            again = await http.post("/v1/completions", json={"prompt": [5]})
            return refused, again

    refused, again = asyncio.run(ask())
    assert refused.status_code == 429 and refused.headers["Retry-After"]
    assert again.status_code == 200
    assert ours.open == 0


def test_echo_gives_back_characters_that_span_tokens():
    prompt = "h🦀é"
    ours = service(Scripted())
    ids = ours.prompts.tokenizer.encode(prompt, False)
    assert len(ids) > len(prompt)
    found = post(ours, {"prompt": ids, "echo": True, "max_tokens": 3}).json()
    text = found["choices"][0]["text"]
    assert text.startswith(prompt) and len(text) > len(prompt)


def test_usage_counts_no_tokens_behind_a_stop_string():
    tokenizer = service(Scripted()).prompts.tokenizer
    tokens = tokenizer.encode("a.b,c", False)
    ours = service(Scripted(tokens))
    found = post(ours, {"prompt": "a", "stop": ".", "max_tokens": 16}).json()
    assert found["choices"][0]["finish_reason"] == "stop"
    assert 0 < found["usage"]["completion_tokens"] < len(tokens)


def test_a_body_that_does_not_come_is_given_up():
    class Stalled:
        async def stream(self):
            yield b"{"
            await asyncio.sleep(60)

    with pytest.raises(ApiError, match="did not come") as error:
        asyncio.run(read_json(Stalled(), 100, seconds=0.01))
    assert error.value.status == 408


@pytest.mark.parametrize("keys", [("",), ("secret", " ")])
def test_an_empty_key_is_refused(keys):
    with pytest.raises(ConfigError, match="api_key is empty"):
        Settings(model_name="m", api_keys=keys)


@pytest.mark.slow
def test_streams_end_and_the_engine_is_closed_after_sigterm():
    """The process ends by itself, with 0: not of the signal, which would leave the engine open."""
    code = (
        "from tests.serving import test_http_faults as t; from specjax.serving.http import process;"
        "r = t.Scripted(tokens=range(5, 25), pause_s=0.1);"
        "s = t.service(r, with_text=False);"
        "process.serve(s, process.bind('127.0.0.1', {port})); print('closed', r.closed)"
    )
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    child = subprocess.Popen(
        [sys.executable, "-c", code.format(port=port)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=paths.REPOSITORY,
    )
    try:
        _wait_until_up(port)
        bodies = [json.dumps({"prompt": [5], "stream": True, "max_tokens": 20}).encode()] * 8
        texts: list[str] = []
        readers = [
            threading.Thread(target=lambda body=body: texts.append(_read(port, body)))
            for body in bodies
        ]
        for reader in readers:
            reader.start()
        time.sleep(0.8)
        child.send_signal(signal.SIGTERM)
        for reader in readers:
            reader.join(30)
        assert [text.count('"token_ids"') for text in texts] == [20] * 8
        assert all(text.rstrip().endswith("[DONE]") for text in texts)
        assert child.communicate(timeout=30)[0].strip() == "closed True"
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def _wait_until_up(port):
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not come up")


def _read(port, body):
    url = f"http://127.0.0.1:{port}/v1/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
        return answer.read().decode()
