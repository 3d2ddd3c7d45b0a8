"""/v1/completions: texts or token ids go on; with `echo` and `logprobs` they are scored."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from specjax.serving.http import endpoints, formats
from specjax.serving.http.body import read_json
from specjax.serving.http.endpoints import Job, Service
from specjax.serving.http.generation import Delta
from specjax.serving.http.protocol import Completion, parse


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
        # Of each choice in a stream, characters so far.
        self._sent: dict[int, int] = {}

    def _prompt_text(self, index: int) -> str:
        """What `echo` puts before a choice: characters may span tokens, so the prompt is decoded as one."""
        if not self._body.echo:
            return ""
        ids = self._job.requests[index].prompt_ids
        tokenizer = self._service.prompts.tokenizer
        if tokenizer is None:
            return "".join(map(self._service.pieces, ids))
        return tokenizer.decode(ids, skip_special_tokens=False)

    def _logprobs(self, index: int, deltas: list[Delta], begin: int, prompt: bool):
        if self._body.logprobs is None:
            return None
        tokens: list = []
        if prompt and self._body.echo:
            tokens.append(self._job.requests[index].prompt_ids[0])
            tokens += [each for delta in deltas for each in delta.prompt_logprobs]
        tokens += [each for delta in deltas for each in delta.logprobs]
        return self._service.pieces.completion(tokens, begin, self._body.logprobs)

    def whole(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        end = deltas[-1]
        return {
            "index": index,
            "text": self._prompt_text(index) + "".join(delta.text for delta in deltas),
            "logprobs": self._logprobs(index, deltas, 0, True),
            "finish_reason": end.finish_reason,
            "speculative_decoding_stats": formats.speculation(end.statistics),
        }

    def pieces(self, index: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        text = (self._prompt_text(index) if first else "") + delta.text
        begin = self._sent.get(index, 0)
        self._sent[index] = begin + len(text)
        return [
            {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(index, [delta], begin, first),
                "finish_reason": delta.finish_reason,
                **formats.extras(delta),
            }
        ]
