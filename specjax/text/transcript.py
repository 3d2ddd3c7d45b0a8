"""The text of a request while it is generated: pieces that stay, and the first stop string."""

import sys
from collections.abc import Sequence

from specjax.errors import ConfigError
from specjax.text.tokenizer import Tokenizer, unicode_text


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as a user gives them: one, several or none; repeated ones count once.

    Raises:
        ConfigError: one is empty or no string.
    """
    given = () if stop is None else (stop,) if isinstance(stop, str) else stop
    try:
        found = tuple(dict.fromkeys(given))
    except TypeError:
        raise ConfigError(f"{stop=}: expected a string or a list of strings") from None
    if not all(isinstance(text, str) for text in found):
        raise ConfigError(f"{stop=}: expected a string or a list of strings")
    for text in found:
        unicode_text("stop", text)
    if "" in found:
        raise ConfigError(f"{stop=}: an empty stop string would stop everything")
    return found


class Transcript:
    """Takes in the new tokens of one request.

    A stop string ends the text where it begins: in the text itself, or in the text with the special tokens written out
    that are left out of it, of which it must hold whole ones (`<|im_end|>`, `.<|eot_id|>`). The prompt has no part in
    it. The work per token does not grow with the text.

    Args:
        tokenizer: what decodes.
        prompt: token ids before the new ones.
        stop: see `stop_strings`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._decoder = tokenizer.stream_decoder(prompt)
        self._special = tokenizer.special_tokens
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._shown, self._written = _Tail(self._longest), _Tail(self._longest)
        self._parts: list[str] = []
        self._length = self._sent = 0
        self._count = 0
        self._end: int | None = None
        self._stopped = False

    def read(self, tokens: Sequence[int]) -> int | None:
        """Takes in what is new in `tokens`; how many of all to keep, once a stop string is complete."""
        while self._count < len(tokens) and not self._stopped:
            token = tokens[self._count]
            self._count += 1
            self._add(self._decoder.step(token))
            if self._stop:
                if token in self._special:
                    self._written.add_whole(self._special[token], self._length)
                self._find()
        return self._count if self._stopped else None

    def piece(self) -> str:
        """Text since the last call that will stay: no half character, no possible beginning of a stop string."""
        end = self._length if self._end is None else self._end
        if self._stop and not self._stopped:
            end = min(end, self._shown.held(self._stop), self._written.held(self._stop))
        return self._send(end)

    def finish(self, tokens: Sequence[int]) -> str:
        """The rest of the text, after the last tokens."""
        self.read(tokens)
        self._add(self._decoder.finish())
        return self._send(self._length if self._end is None else self._end)

    def _add(self, text: str) -> None:
        if not text:
            return
        self._parts.append(text)
        for tail in (self._shown, self._written) if self._stop else ():
            tail.add(text, self._length)
        self._length += len(text)

    def _send(self, end: int) -> str:
        """The text from what was sent to `end`."""
        text, size = "".join(self._parts), max(end - self._sent, 0)
        self._sent += size
        self._parts = [text[size:]]
        return text[:size]

    def _find(self) -> None:
        """Looks for stop strings that end in what the last token added."""
        before, pending = self._decoder.open_text(self._longest)
        found = [
            begin
            for tail in (self._shown, self._written)
            if (begin := tail.find(self._stop, pending, self._length + before)) is not None
        ]
        if found:
            self._stopped, self._end = True, min(found)
        for tail in (self._shown, self._written):
            tail.cut()


class _Tail:
    """The last characters of a text that may still become part of a stop string.

    Attributes:
        text: the characters.
        begins: for each, the place in the shown text where a stop string that begins with it ends that text; None
            within a special token.
        place: the place in the shown text where it ends.
        ends: for each, whether a stop string may end with it.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self.place = 0
        self.text, self.begins, self.ends = "", [], []

    def add(self, text: str, place: int) -> None:
        self.text += text
        self.place = place + len(text)
        self.begins += range(place, place + len(text))
        self.ends += [True] * len(text)

    def add_whole(self, text: str, place: int) -> None:
        """Adds a special token, which is not shown."""
        self.text += text
        self.place = place
        self.begins += [place] + [None] * (len(text) - 1)
        self.ends += [False] * (len(text) - 1) + [True]

    def cut(self) -> None:
        """Forgets what is too far back."""
        keep = max(len(self.text) - self._longest + 1, 0)
        self.text, self.begins, self.ends = self.text[keep:], self.begins[keep:], self.ends[keep:]

    def find(self, stop: Sequence[str], pending: str, place: int) -> int | None:
        """Where the first stop string begins, in this text and the one that is pending from `place` on."""
        joined = not self.begins or not pending or self.place == place
        text, known = (self.text + pending, len(self.text)) if joined else (pending, 0)
        first = None
        for string in stop:
            at = text.find(string)
            while at >= 0:
                last = at + len(string) - 1
                begin = self.begins[at] if at < known else place + at - known
                if begin is not None and (last >= known or self.ends[last]):
                    first = begin if first is None else min(first, begin)
                    break
                at = text.find(string, at + 1)
        return first

    def held(self, stop: Sequence[str]) -> int:
        """Where the longest end of the text begins with which a stop string begins; beyond the text if none does."""
        for at, begin in enumerate(self.begins):
            if begin is not None and any(string.startswith(self.text[at:]) for string in stop):
                return begin
        return sys.maxsize
