"""How a server behaves towards its clients."""

import hashlib
import hmac
from dataclasses import dataclass

from starlette.requests import Request

from specjax.errors import ConfigError
from specjax.serving.http.errors import ApiError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Attributes:
    model_name: the name that clients use first.
    aliases: other names for it.
    api_keys: keys that are let in; none: everybody is.
    isolate_keys: prefixes of texts are not shared between keys.
    max_queue: requests that may wait; more are told to come back.
    max_body_bytes: of a request.
    request_timeout_s: a request ends then, finished or not; None: never.
    send_timeout_s: a reader that takes nothing for so long is dropped.
    drain_s: running requests may take so long after the server was told to end.
    default_temperature: where a request has none.
    """

    model_name: str
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    isolate_keys: bool = False
    max_queue: int = 32
    max_body_bytes: int = 1 << 20
    request_timeout_s: float | None = None
    send_timeout_s: float = 30.0
    drain_s: float = 60.0
    default_temperature: float = 1.0

    def __post_init__(self):
        if not all(key.strip() for key in self.api_keys):
            # It would let in whoever sends none, as when a shell's variable was not set.
            raise ConfigError("api_key is empty: give a key, or leave the option out")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.model_name, *self.aliases)

    def namespace(self, request: Request) -> str:
        """Whose prefixes a request may share; also refuses it where its key is none of ours.

        Raises:
            ApiError: 401.
        """
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not self.api_keys:
            return ""
        # All keys are compared, each in constant time.
        matches = [hmac.compare_digest(given, key.encode()) for key in self.api_keys]
        if not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return hashlib.sha256(given).hexdigest()[:16] if self.isolate_keys else ""

    def check_model(self, name: str | None) -> None:
        """Raises ApiError, 404, for a model that is not served."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"model={name!r} is not served here; supported: {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
