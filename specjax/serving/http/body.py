"""Reading the bodies of requests, within a limit that is counted while they arrive."""

import asyncio
import json
from typing import Any

from starlette.requests import Request

from specjax.serving.http.errors import ApiError

_SECONDS = 30.0


async def read_json(request: Request, limit: int, seconds: float = _SECONDS) -> Any:
    """The JSON value of a body.

    Raises:
        ApiError: 413 beyond `limit` bytes, 408 if it has not come within `seconds`, 400 for what is no JSON.
    """
    try:
        async with asyncio.timeout(seconds):
            content = await _read(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s") from None
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


async def _read(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
