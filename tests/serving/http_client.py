"""A served fake runner, and what asks it in process."""

import asyncio
import functools
import json
from types import SimpleNamespace
from typing import Any

import httpx

from specjax.serving.http import app, process
from specjax.serving.http.settings import Settings
from specjax.serving.types import Limits
from specjax.text import tokenizer as tokenizers
from tests import paths
from tests.serving.fake_runner import FakeRunner

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWER = "Hello world, how are you?"


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    return tokenizers.load(paths.fixture("tiny-fp16"), chat_template=TEMPLATE)


class Served:
    """The application over a fake runner that says `text`, then the end of the text.

    Args:
        text: what every request is answered, or the tokens.
        runner: options of the runner.
        settings: of the server.
    """

    def __init__(
        self, text=ANSWER, runner: dict | None = None, limits: dict | None = None, **settings
    ):
        tok = tokenizer()
        tokens = [*tok.encode(text, False), tok.eos_token_id] if isinstance(text, str) else text
        sizes = dict(num_slots=3, max_model_len=64, vocab_size=1024, max_logprobs=5)
        found = Limits(**{**sizes, "prompt_logprobs": True, **(limits or {})})
        self.runner = FakeRunner(lambda request: tokens, limits=found, **(runner or {}))
        model = SimpleNamespace(tokenizer=tok, stop_ids=(tok.eos_token_id,))
        self.service = process.service(
            model, self.runner, Settings(**{"model_name": "tiny", **settings})
        )
        self.app = app.create(self.service)

    async def request(self, method: str, path: str, **options) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return asyncio.run(self.request("GET", path, **options))

    def post(self, path: str, body: Any = None, **options) -> httpx.Response:
        given = {} if body is None else {"json": body}
        return asyncio.run(self.request("POST", path, **given, **options))

    def complete(self, prompt: Any = "Hi", **fields) -> dict:
        """The answer of /v1/completions, which must be one; of a stream: its pieces."""
        return self._answer("/v1/completions", {"prompt": prompt, "max_tokens": 20, **fields})

    def chat(self, **fields) -> dict:
        """As `complete`, of /v1/chat/completions."""
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        return self._answer("/v1/chat/completions", body)

    def _answer(self, path: str, body: dict):
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return pieces(response.text) if body.get("stream") else response.json()

    def refusal(self, body: Any, path: str = "/v1/completions", status: int = 400) -> dict:
        """The error of a request, which must be one with this status."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    async def leave(self, path: str, body: dict, after: asyncio.Event | None = None) -> list[dict]:
        """A client that goes away once `after` is set, or as soon as something was sent; what it was sent."""
        sent: list[dict] = []
        gone = asyncio.Event() if after is None else after
        incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> dict:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)
            if message.get("body"):
                gone.set()

        scope = {
            **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode()},
            **{"query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http"},
            **{"server": ("test", 80), "client": ("test", 1), "root_path": ""},
        }
        await self.app(scope, receive, send)
        return sent


def pieces(text: str) -> list[dict]:
    """The JSON of a stream's events, which must end with [DONE]."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(answer) -> str:
    """The text of the only choice, whole or streamed, of either endpoint."""
    chunks = answer if isinstance(answer, list) else [answer]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    read = lambda c: c.get("text") or (c.get("message") or c.get("delta") or {}).get("content")
    return "".join(read(choice) or "" for choice in choices)
