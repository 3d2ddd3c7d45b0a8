"""Files of prompts: read, checked, encoded."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import specjax
from specjax.errors import CapacityError, ConfigError, SpecjaxError
from specjax.text import chat, inputs
from specjax.text.tokenizer import unicode_text


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a prompts file (JSON lines; blank lines are skipped).

    Returns:
        per row: `id` (default: the row's number from 0), `line` (from 1, for messages), and the one of input_ids,
        messages, text (raw) and prompt (user turn) that counts, as `row`, ready for `LanguageModel.generate`.
    Raises:
        ConfigError: a line is malformed (named by its number), an id occurs twice, or there are no rows.
        OSError: the file cannot be read.
    """
    rows, seen = [], {}
    for number, fields in read_objects(path):
        where = f"{path}:{number}"
        name = fields.get("id", len(rows))
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise ConfigError(f"{where}: id={name!r}: expected a string or a whole number")
        if isinstance(name, str):
            _named(where, lambda name=name: unicode_text("id", name))
        if name in seen:
            raise ConfigError(f"{where}: id={name!r} occurs on line {seen[name]} too")
        seen[name] = number
        rows.append({"id": name, "line": number, "row": _prompt(fields, where)})
    if not rows:
        raise ConfigError(
            f"{path}: no rows; each line is an object with one of {', '.join(inputs.FIELDS)}"
        )
    return rows


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a file of JSON lines; blank lines are skipped.

    Raises:
        ConfigError: a line is no object (named by its number), or the file is not text.
        OSError: the file cannot be read.
    """
    for number, line in enumerate(_lines(Path(path)), start=1):
        if line.strip():
            yield number, _object(line, f"{path}:{number}")


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(), which also splits at characters that JSON strings may contain.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: expected an object, found {type(fields).__name__}")
    return fields


def _prompt(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The prompt field that counts, with its type checked."""
    name = next((name for name in inputs.FIELDS if fields.get(name) is not None), None)
    if name is None:
        raise ConfigError(
            f"{where}: fields {sorted(fields)}; one of {', '.join(inputs.FIELDS)} is needed"
        )
    value = fields[name]
    if name in ("text", "prompt"):
        valid, expected = isinstance(value, str), "a string"
        if valid:
            _named(where, lambda: unicode_text(name, value))
    elif name == "input_ids":
        valid = isinstance(value, list) and all(map(_is_token, value))
        expected = "a list of token ids"
    else:
        _named(where, lambda: chat.messages(value))
        return {name: value}
    if not valid:
        raise ConfigError(f"{where}: {name}: expected {expected}")
    return {name: value}


def _named[Value](where: str, check: Callable[[], Value]) -> Value:
    """What `check` gives; its errors begin with `where`."""
    try:
        return check()
    except SpecjaxError as error:
        raise type(error)(f"{where}: {error}") from error


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def encode(
    model: specjax.LanguageModel,
    prompts: Sequence[dict[str, Any]],
    source: str,
    max_length: int | None = None,
    **chat_options: Any,
) -> list[list[int]]:
    """Token ids of the rows of `read_prompts`; what is wrong with one is said before any is run.

    Args:
        source: what errors call the file; the line follows where a row has one.
        max_length: bound on prompt + new tokens; None = the model's positions.
        **chat_options: how conversations end; see `LanguageModel.encode`.
    Raises:
        ConfigError, CapacityError: a prompt cannot be encoded, is empty, or leaves no room for new tokens.
    """
    positions = model.config.max_position_embeddings
    limit = min(max_length or positions, positions)
    name = "max_length" if limit < positions else "the model's max_position_embeddings"
    encoded = []
    for prompt in prompts:
        where = source
        if prompt["line"] is not None:
            where += f":{prompt['line']}: row {prompt['id']!r}"
        row = prompt["row"]
        ids = _named(where, lambda row=row: model.encode(row, **chat_options))
        if len(ids) >= limit:
            raise CapacityError(
                f"{where}: the prompt has {len(ids)} tokens, {name} is {limit}: no room for new ones; shorten it"
            )
        encoded.append(ids)
    return encoded
