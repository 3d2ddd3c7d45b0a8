"""Reading the bodies of requests, within a limit that is counted while they arrive."""

import json
from typing import Any

from starlette.requests import Request

from specjax.serving.http.errors import ApiError


async def read_json(request: Request, limit: int) -> Any:
    """The JSON value of a body.

    Raises:
        ApiError: 413 beyond `limit` bytes, 400 for what is no JSON.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        parts.append(part)
    try:
        return json.loads(b"".join(parts), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
