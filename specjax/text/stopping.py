"""Stop strings: where in the token stream a text first contains one of them."""

from collections.abc import Callable, Sequence

from specjax.errors import ConfigError


class StopStrings:
    """Finds the first token after which the decoded text contains a stop string.

    Args:
        stop: strings, none of them empty.
        decode: token ids -> text.
    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, stop: Sequence[str], decode: Callable[[list[int]], str]):
        if any(not text for text in stop):
            raise ConfigError(f"stop={list(stop)!r}: an empty stop string would stop everything")
        self.stop, self._decode = tuple(stop), decode
        self._seen: dict[int, int] = {}

    def __call__(self, request, tokens: list[int]) -> int | None:
        """Number of tokens to keep, the one that completes a stop string included; None if there is none yet."""
        if not self._contained(self._decode(tokens)):
            self._seen[request.request_id] = len(tokens)
            return None
        low, high = self._seen.get(request.request_id, 0), len(tokens)
        while high - low > 1:
            middle = (low + high) // 2
            if self._contained(self._decode(tokens[:middle])):
                high = middle
            else:
                low = middle
        return high

    def cut(self, text: str) -> str:
        """The text before its first stop string."""
        found = [index for index in map(text.find, self.stop) if index >= 0]
        return text[: min(found)] if found else text

    def _contained(self, text: str) -> bool:
        return any(stop in text for stop in self.stop)
