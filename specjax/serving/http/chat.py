"""/v1/chat/completions."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from specjax.serving.http import endpoints, formats
from specjax.serving.http.body import read_json
from specjax.serving.http.endpoints import Job, Service
from specjax.serving.http.generation import Delta
from specjax.serving.http.protocol import Chat, parse


async def answer(service: Service, http: HttpRequest) -> Response:
    """Answers a conversation."""
    namespace = service.settings.namespace(http)
    body = parse(Chat, await read_json(http, service.settings.max_body_bytes))
    service.settings.check_model(body.model)
    stop = service.prompts.stop_strings(body)
    requests = service.prompts.requests(body, service.prompts.chat(body), namespace)
    job = Job(kind="chat.completion", body=body, requests=requests, stop=stop)

    def whole(index: int, deltas: list[Delta]) -> dict[str, Any]:
        end = deltas[-1]
        end = deltas[-1]
        message = {"role": "assistant", "content": "".join(d.text for d in deltas), "refusal": None}
        tokens = [logprob for delta in deltas for logprob in delta.logprobs]
        return {
            "index": index,
            "message": message,
            "logprobs": service.pieces.chat(tokens) if body.logprobs else None,
            "finish_reason": end.finish_reason,
            **formats.ending(end),
        }

    def pieces(index: int, delta: Delta, first: bool) -> list[dict[str, Any]]:
        found = []
        if first:
            opening = {"role": "assistant", "content": ""}
            found.append(
                {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
            )
        found.append(
            {
                "index": index,
                "delta": {"content": delta.text} if delta.text else {},
                "logprobs": service.pieces.chat(delta.logprobs) if body.logprobs else None,
                "finish_reason": delta.finish_reason,
                **formats.extras(delta),
            }
        )
        return found

    if body.stream:
        return endpoints.stream(service, job, pieces)
    return await endpoints.whole(service, http, job, whole)
