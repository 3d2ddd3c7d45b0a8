"""Text for calibration: from a file to windows of tokens.

Quantizers see windows of equal length, cut from documents in an order that the seed decides.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from specjax.errors import ConfigError
from specjax.text import chat

_ROW_FIELDS = "text, messages, turns, or prompt (with response)"


class Tokenizer(Protocol):
    """What calibration needs of a tokenizer; `specjax.text.tokenizer.Tokenizer` is one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]: ...


def read_documents(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each document of a file.

    A .txt file is one document. .jsonl has one object per line, .json a list of objects; a field
    `text` is taken as it is, `messages`, `turns` (the first user turn) and `prompt` with an
    optional `response` go through the chat template.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: the file holds no text, or a row none of these fields; the row is named.
    """
    return [tokens for tokens, _ in read_conversations(path, tokenizer)]


def read_conversations(
    path: Path, tokenizer: Tokenizer, field: str = "calibration_file"
) -> list[tuple[list[int], int | None]]:
    """Like `read_documents`, with the index of the assistant's first token; None where nobody answers.

    Args:
        field: what error messages call the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{field}={path}: no such file")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ConfigError(f"{field}={path}: is empty")
    if path.suffix not in (".json", ".jsonl"):
        return [(tokenizer.encode(text), None)]
    name = f"{field}={path}"
    return [_encode(row, tokenizer, f"{name}: {place}") for place, row in _rows(text, path, name)]


def windows(
    documents: Sequence[Sequence[int]], count: int, length: int, seed: int, name: str
) -> Int[np.ndarray, "S T"]:
    """`count` windows of `length` tokens from the documents, shuffled by `seed` and joined.

    Args:
        documents: token ids.
        count: windows to take; 0 takes as many as there are.
        length: tokens of a window.
        seed: decides the order of documents.
        name: of the file, for errors.

    Raises:
        ConfigError: there is less text.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    tokens = np.concatenate([np.asarray(documents[i], np.int32) for i in order])
    available = len(tokens) // length
    if available < max(count, 1):
        raise ConfigError(
            f"calibration_file={name}: {len(tokens)} tokens make {available} windows of {length}, "
            f"{max(count, 1)} are wanted ({max(count, 1) * length} tokens); lower "
            "calibration_samples or calibration_tokens, or give more text"
        )
    return tokens[: (count or available) * length].reshape(-1, length)


def _rows(text: str, path: Path, file: str) -> list[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        lines = [(f"line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        lines = [("the file", text)]
    rows = []
    for name, line in lines:
        try:
            rows.append((name, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: {name} is not JSON: {error}") from None
    if path.suffix == ".jsonl":
        return rows
    if not isinstance(rows[0][1], list):
        raise ConfigError(f"{file}: expected a JSON list of objects")
    return [(f"row {i}", row) for i, row in enumerate(rows[0][1], 1)]


def _encode(row: Any, tokenizer: Tokenizer, name: str) -> tuple[list[int], int | None]:
    fields = row if isinstance(row, dict) else {}
    try:
        if isinstance(fields.get("text"), str):
            return tokenizer.encode(fields["text"]), None
        if messages := _messages(fields):
            return _conversation(messages, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    raise ConfigError(f"{name} has none of the fields {_ROW_FIELDS}; found {sorted(fields)}")


def _conversation(
    messages: list[dict[str, Any]], tokenizer: Tokenizer
) -> tuple[list[int], int | None]:
    # The template ends where the assistant begins to speak: its last words follow as they are.
    answered = messages[-1]["role"] == "assistant"
    said = (messages.pop().get("content") or "") if answered else ""
    asked = tokenizer.apply_chat_template(messages)
    return asked + tokenizer.encode(said, False), len(asked) if answered else None


def _messages(fields: dict[str, Any]) -> list[dict[str, str]]:
    """A row's conversation; empty if it has none."""
    messages, turns, prompt = (fields.get(name) for name in ("messages", "turns", "prompt"))
    if isinstance(messages, list):
        return chat.messages(messages) if messages else []
    if isinstance(turns, list) and turns:
        return chat.messages([{"role": "user", "content": turns[0]}])
    if not isinstance(prompt, str):
        return []
    said = fields.get("response")
    answer = [{"role": "assistant", "content": said}] if isinstance(said, str) else []
    return [{"role": "user", "content": prompt}, *answer]
