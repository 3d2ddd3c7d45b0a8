"""Token ids to text as they come: what a completion adds to its prompt, a few tokens at a time."""

import codecs
import re
from collections.abc import Collection, Sequence
from typing import Any

# Tokens that are decoded together with each new one: what a decoder carries over a boundary (three bytes of an open
# character) is shorter, as every token has at least a byte.
_WINDOW = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_OPEN = "\ufffd"


class StreamDecoder:
    """Decodes ids one by one: no halves of UTF-8 characters, no lost spaces.

    The pieces that `step` and `finish` return, joined, are what `decode(prompt + ids)` has behind what it shares with
    `decode(prompt)`: blanks that decoders strip from the start of a text stay, and a character whose first bytes end
    the prompt is there as a whole. The work per token is constant, however long the text (a run of byte tokens,
    which decodes as a whole, is decoded once).

    Args:
        backend: a `tokenizers.Tokenizer`.
        prompt: ids before the first one.
        skipped: ids of the tokens that shall have no text: the special ones, or none.
    """

    def __init__(
        self, backend: Any, prompt: Sequence[int] = (), skipped: Collection[int] = frozenset()
    ):
        self._backend, self._skipped = backend, skipped
        self._window, self._run = self._tail(prompt)
        # Until the new text has left what it shares with the prompt's, `_sent` is not known.
        self._before: str | None = self._decode(self._window)
        self._sent = 0
        self._held = ""

    def step(self, token_id: int) -> str:
        """Takes one id; returns the text that it completes, "" while a character is open."""
        token = self._token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        # A run of byte tokens decodes as a whole (one wrong byte spoils all), so it waits for its end.
        if byte := _BYTE_TOKEN.fullmatch(token):
            self._run.add(int(byte[1], 16))
            return ""
        self._run = _ByteRun()
        return self._take(final=False)

    def finish(self) -> str:
        """What is left when no more ids come: held bytes, an incomplete character as U+FFFD."""
        self._run = _ByteRun()
        return self._take(final=True)

    def open_text(self, limit: int) -> tuple[int, str]:
        """What `finish` would return now, from the left: characters left out, and about `limit` more."""
        if self._before is not None:
            text = self._decode(self._window)
            return 0, text[_shared(self._before, text) :]
        size = len(self._held) + self._run.size
        text = (self._held + self._run.text(limit))[-limit:] if limit else ""
        return size - len(text), text

    def _take(self, final: bool) -> str:
        text = self._decode(self._window)
        stable = len(text) - (not final and text.endswith(_OPEN))
        if self._before is not None:
            shared = _shared(self._before, text[:stable])
            if shared == stable and not final:
                return ""
            self._sent, self._before = shared, None
        piece, self._held = text[self._sent : stable], text[stable:]
        self._sent = stable
        if len(self._window) > 2 * _WINDOW and not final:
            del self._window[:-_WINDOW]
            self._sent = len(self._decode(self._window)) - len(self._held)
        return piece

    def _tail(self, prompt: Sequence[int]) -> tuple[list[int], "_ByteRun"]:
        """The last ids of a prompt that what follows may depend on: the bytes at its end, and the window before."""
        ids: list[int] = []
        run: list[int] = []
        spare = _WINDOW
        for token_id in reversed(prompt):
            token = self._token(token_id)
            if token is None:
                continue
            ids.append(token_id)
            byte = _BYTE_TOKEN.fullmatch(token)
            if byte and spare == _WINDOW:
                run.append(int(byte[1], 16))
                continue
            spare -= 1
            if not spare:
                break
        bytes_ = _ByteRun()
        for value in reversed(run):
            bytes_.add(value)
        return ids[::-1], bytes_

    def _token(self, token_id: int) -> str | None:
        """The token of an id, None if it has no text."""
        return None if token_id in self._skipped else self._backend.id_to_token(token_id)

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=bool(self._skipped))


class _ByteRun:
    """Byte tokens in a row: characters while they are UTF-8, else U+FFFD for every byte."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._characters: list[str] = []
        self._count = 0
        self._valid = True

    def add(self, byte: int) -> None:
        self._count += 1
        try:
            if self._valid and (character := self._utf8.decode(bytes([byte]))):
                self._characters.append(character)
        except UnicodeDecodeError:
            self._valid = False

    @property
    def size(self) -> int:
        """Characters of its text as it is now."""
        return len(self._characters) if self._whole() else self._count

    def text(self, limit: int) -> str:
        """The last `limit` characters."""
        if self._whole():
            return "".join(self._characters[-limit:])
        return _OPEN * min(self._count, limit)

    def _whole(self) -> bool:
        return self._valid and not self._utf8.getstate()[0]


def _shared(first: str, second: str) -> int:
    """How many characters both begin with."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
