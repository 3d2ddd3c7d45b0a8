"""/v1/completions: texts or token ids go on; with `echo` and `logprobs` they are scored."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from specjax.serving.http import endpoints, formats
from specjax.serving.http.body import read_json
from specjax.serving.http.endpoints import Job, Service
from specjax.serving.http.generation import Delta
from specjax.serving.http.protocol import Completion, parse
from specjax.text.tokenizer import Tokenizer


async def answer(service: Service, http: HttpRequest) -> Response:
    """Goes on with one or several prompts."""
    namespace = service.settings.namespace(http)
    body = parse(Completion, await read_json(http, service.settings.max_body_bytes))
    service.settings.check_model(body.model)
    stop = service.prompts.stop_strings(body)
    requests = [
        request
        for prompt in service.prompts.completion(body)
        for request in service.prompts.requests(body, prompt, namespace)
    ]
    job = Job(kind="text_completion", body=body, requests=requests, stop=stop)
    show = _Choices(service, job)
    if body.stream:
        return endpoints.stream(service, job, show.pieces)
    return await endpoints.whole(service, http, job, show.whole)


class _Choices:
    """Choices of one request."""

    def __init__(self, service: Service, job: Job):
        self._service, self._job, self._body = service, job, job.body
        self._tokenizer = service.prompts.tokenizer
        # Of each choice in a stream, characters so far and where its next token begins.
        self._sent: dict[int, int] = {}
        self._places: dict[int, _Places] = {}

    def _prompt(self, index: int) -> list[str]:
        """What `echo` puts before a choice, token by token; special tokens that the tokenizer added have no text."""
        ids = self._job.requests[index].prompt_ids
        if not self._body.echo or self._tokenizer is None:
            return [""] * len(ids)
        given = self._body.prompt
        given = given if isinstance(given, str) else given[index // self._body.n]
        added = self._tokenizer.special_tokens if isinstance(given, str) else {}
        decoder = self._tokenizer.stream_decoder(skip_special_tokens=False)
        hidden = {token for token, text in added.items() if text not in given}
        parts = ["" if token in hidden else decoder.step(token) for token in ids]
        return [*parts[:-1], parts[-1] + decoder.finish()]

    def _logprobs(self, index: int, deltas: list[Delta], prompt: list[str] | None, end: int | None):
        """`logprobs` of new tokens, behind the prompt's parts where those are given; no place is beyond `end`."""
        if self._body.logprobs is None:
            return None
        tokens: list = []
        starts: list[int] = []
        if prompt is not None:
            begin = sum(map(len, prompt))
            ids = self._job.requests[index].prompt_ids
            self._places[index] = _Places(self._tokenizer, ids, begin)
            if self._body.echo:
                tokens = [ids[0], *(each for delta in deltas for each in delta.prompt_logprobs)]
                starts = [sum(map(len, prompt[:count])) for count in range(len(prompt))]
        new = [each for delta in deltas for each in delta.logprobs]
        starts += [self._places[index].next(each.token) for each in new]
        if end is not None:
            starts = [min(start, end) for start in starts]
        return self._service.pieces.completion(tokens + new, starts, self._body.logprobs)

    def whole(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        prompt = self._prompt(index)
        text = "".join([*prompt, *(delta.text for delta in deltas)])
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, deltas, prompt, len(text)),
            "finish_reason": deltas[-1].finish_reason,
            **formats.ending(deltas[-1]),
        }

    def pieces(self, index: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        prompt = self._prompt(index) if first else None
        text = "".join(prompt or ()) + delta.text
        sent = self._sent[index] = self._sent.get(index, 0) + len(text)
        end = None if delta.finish_reason is None else sent
        return [
            {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(index, [delta], prompt, end),
                "finish_reason": delta.finish_reason,
                **formats.extras(delta),
            }
        ]


class _Places:
    """Where the tokens behind a prompt begin, in characters of the text."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], begin: int):
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder(prompt)
        self._at = begin

    def next(self, token: int) -> int:
        """The place of the next token."""
        begin = self._at
        self._at += 0 if self._decoder is None else len(self._decoder.step(token))
        return begin
