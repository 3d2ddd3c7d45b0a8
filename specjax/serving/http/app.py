"""The application: endpoints, errors as JSON, the page."""

import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from specjax.errors import SpecjaxError
from specjax.serving.http import chat, completions
from specjax.serving.http.body import read_json
from specjax.serving.http.endpoints import Service
from specjax.serving.http.errors import ApiError
from specjax.serving.http.protocol import Detokenize, Tokenize, parse

_log = logging.getLogger(__name__)
_PAGE = Path(__file__).parent / "static"
# The page's own files only; no inline scripts, nothing from elsewhere.
_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"

Endpoint = Callable[[Service, Request], Awaitable[Response]]


def create(service: Service) -> Starlette:
    """The ASGI application over a service."""

    def route(path: str, endpoint: Endpoint, method: str) -> Route:
        async def call(request: Request) -> Response:
            try:
                return await endpoint(service, request)
            except ClientDisconnect:
                return Response(status_code=499)
            except (ApiError, HTTPException, SpecjaxError):
                raise
            except Exception as error:
                # Here, and not by Starlette, which would raise it again: servers log that with all it says.
                return _failure(request, error)

        return Route(path, call, methods=[method])

    routes = [
        route("/v1/chat/completions", chat.answer, "POST"),
        route("/v1/completions", completions.answer, "POST"),
        route("/v1/models", _models, "GET"),
        route("/v1/models/{name:path}", _model, "GET"),
        route("/tokenize", _tokenize, "POST"),
        route("/detokenize", _detokenize, "POST"),
        route("/health", _health, "GET"),
        route("/ready", _ready, "GET"),
        route("/metrics", _metrics, "GET"),
        route("/version", _version, "GET"),
        *(_page_file(path) for path in sorted(_PAGE.iterdir())),
    ]
    handlers = {
        ApiError: _api_error,
        HTTPException: _http_error,
        SpecjaxError: _our_error,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


def _page_file(path: Path) -> Route:
    """A file of the page; a route of its own, so that wrong methods of endpoints stay 405."""
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}

    async def call(request: Request) -> Response:
        return FileResponse(path, headers=headers)

    return Route("/" if path.name == "index.html" else f"/{path.name}", call)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    text = {
        404: f"there is no {request.url.path} here",
        405: f"{request.method} is not allowed here",
    }
    message = text.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _our_error(request: Request, error: SpecjaxError) -> Response:
    return ApiError(400, str(error)).response()


def _failure(request: Request, error: Exception) -> Response:
    # Neither the log nor the answer has anything of the prompt.
    _log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
    return ApiError(500, f"the server failed: {type(error).__name__}").response()


def _card(service: Service, name: str) -> dict:
    limits = service.runner.limits
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "specjax",
        "max_model_len": limits.max_model_len,
    }


async def _models(service: Service, request: Request) -> Response:
    service.settings.namespace(request)
    cards = [_card(service, name) for name in service.settings.names]
    return JSONResponse({"object": "list", "data": cards})


async def _model(service: Service, request: Request) -> Response:
    service.settings.namespace(request)
    name = request.path_params["name"]
    service.settings.check_model(name)
    return JSONResponse(_card(service, name))


async def _tokenize(service: Service, request: Request) -> Response:
    service.settings.namespace(request)
    body = parse(Tokenize, await read_json(request, service.settings.max_body_bytes))
    service.settings.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "one of prompt and messages is needed", param="prompt")
    tokenizer = service.prompts.known("prompt")
    if body.messages is None:
        ids = tokenizer.encode(body.prompt, body.add_special_tokens)
    else:
        flags = body.add_generation_prompt, body.continue_final_message
        ids = tokenizer.apply_chat_template(body.messages, *flags)
    found = {"count": len(ids), "max_model_len": service.runner.limits.max_model_len, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [service.pieces(token) for token in ids]
    return JSONResponse(found)


async def _detokenize(service: Service, request: Request) -> Response:
    service.settings.namespace(request)
    body = parse(Detokenize, await read_json(request, service.settings.max_body_bytes))
    service.settings.check_model(body.model)
    vocabulary = service.runner.limits.vocab_size
    wrong = [token for token in body.tokens if not 0 <= token < vocabulary]
    if wrong:
        raise ApiError(400, f"tokens has {wrong[0]}, outside of {vocabulary}", param="tokens")
    text = service.prompts.known("tokens").decode(body.tokens, skip_special_tokens=False)
    return JSONResponse({"prompt": text})


async def _health(service: Service, request: Request) -> Response:
    """Alive: 503 once the engine has failed."""
    if service.runner.failure is not None:
        return JSONResponse({"status": "failed"}, 503)
    return JSONResponse({"status": "ok"})


async def _ready(service: Service, request: Request) -> Response:
    """Takes requests: 503 before it is warm and while it ends."""
    ready = service.runner.ready
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def _metrics(service: Service, request: Request) -> Response:
    content = generate_latest(service.metrics.registry)
    return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _version(service: Service, request: Request) -> Response:
    return JSONResponse({"version": importlib.metadata.version("specjax")})
