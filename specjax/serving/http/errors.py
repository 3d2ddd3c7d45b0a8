"""Errors as OpenAI's clients read them: a status, and an object with message, type, param and code."""

from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What goes back to a client.

    Args:
        status: of HTTP.
        message: what is wrong, with the field, what was found and what is supported.
        param: the field.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.headers = param, code, headers

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        kind = _TYPES.get(self.status, "internal_server_error")
        texts = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {name: _unicode(text) for name, text in texts.items()}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def _unicode(text: str | None) -> str | None:
    """A text that can be sent: JSON may have brought half a surrogate pair, which is written out."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
