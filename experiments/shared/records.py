"""Files of rows: prompts that are read, results that are appended and can be continued after an interruption."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import specjax
from specjax.errors import CapacityError, ConfigError, SpecjaxError
from specjax.text import chat
from specjax.text.tokenizer import unicode_text

_PROMPT_FIELDS = ("input_ids", "messages", "text", "prompt")  # in order of precedence


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
        if not isinstance(name, str | int):
            raise ConfigError(f"{where}: id={name!r}: expected a string or a whole number")
        if isinstance(name, str):
            _named(where, lambda name=name: unicode_text("id", name))
        if name in seen:
            raise ConfigError(f"{where}: id={name!r} occurs on line {seen[name]} too")
        seen[name] = number
        rows.append({"id": name, "line": number, "row": _prompt(fields, where)})
    if not rows:
        raise ConfigError(f"{path}: no rows; each line is an object with one of {_PROMPT_FIELDS}")
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
    name = next((name for name in _PROMPT_FIELDS if fields.get(name) is not None), None)
    if name is None:
        raise ConfigError(
            f"{where}: fields {sorted(fields)}; one of {', '.join(_PROMPT_FIELDS)} is needed"
        )
    value = fields[name]
    if name in ("text", "prompt"):
        valid, expected = isinstance(value, str), "a string"
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


def fingerprint(config: dict[str, Any], fields: Sequence[str]) -> str:
    """Digest of the fields of a configuration that decide what is generated."""
    chosen = json.dumps({name: config[name] for name in fields}, sort_keys=True)
    return hashlib.sha256(chosen.encode()).hexdigest()[:16]


class Records:
    """A JSON-lines file of results with unique ids, appended to row by row.

    Reading checks and remembers; the file is touched by the first `append` (or `repair`) only, so whatever fails before
    leaves it as it was. A last line that an interruption cut short is dropped then.

    Args:
        path: the file; it and its directory need not exist.
        overwrite: start anew, whatever is there.
    Raises:
        ConfigError: a line is not a row of results, nor the beginning of one at the end of the file.
        OSError: the file cannot be read, or could not be written.
    """

    def __init__(self, path: str | Path, overwrite: bool = False):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self._keep_bytes = 0
        self._needs_newline = False
        self._writer = None
        _check_writable(self.path)
        if self.path.exists() and not overwrite:
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        lines = data.split(b"\n")
        last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
        offset = 0
        for index, line in enumerate(lines[: last + 1]):
            try:
                if line.strip():
                    self.rows.append(_result_row(line))
            except ValueError as error:
                if index < last or not self._cut_short(line):
                    raise ConfigError(
                        f"{self.path}:{index + 1}: {error}; pass --overwrite to start anew, or another --output"
                    ) from None
                break
            offset += len(line) + 1
        self._keep_bytes = min(offset, len(data))
        self._needs_newline = offset > len(data)

    def _cut_short(self, line: bytes) -> bool:
        """Whether a last line that is no row is what an interruption left of one, not somebody's other file."""
        try:
            json.loads(line)
        except ValueError:
            return bool(self.rows) or line.lstrip().startswith(b"{")
        return False

    def check_config(self, config: dict[str, Any], fields: Sequence[str]) -> None:
        """Refuses to continue a file that was made with another configuration.

        Args:
            config: the present one.
            fields: names of its fields to compare.
        Raises:
            ConfigError: a row's `config` differs; the fields are named.
        """
        # Through JSON, because tuples come back as lists.
        config = json.loads(json.dumps(config))
        for row in self.rows:
            differing = [name for name in fields if row["config"].get(name) != config[name]]
            if differing:
                changes = "; ".join(
                    f"{name} was {row['config'].get(name)!r}, now {config[name]!r}"
                    for name in differing
                )
                raise ConfigError(
                    f"{self.path}: row {row['id']!r} was made with another configuration ({changes}); pass "
                    "--overwrite to start anew, or another --output"
                )

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; it is in the file when this returns."""
        self.repair()
        # One write per row: an interruption can cut short the last line only.
        self._writer.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._writer.flush()
        self.rows.append(row)

    def repair(self) -> None:
        """Opens the file for appending, without a broken last line."""
        if self._writer is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = self.path.open("ab")
        self._writer.truncate(self._keep_bytes)
        if self._needs_newline:
            self._writer.write(b"\n")

    def close(self) -> None:
        """Closes the file, if it was opened."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _result_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict) or "id" not in row or not isinstance(row.get("config"), dict):
        raise ValueError("not a row of results with id and config")
    return row


def _check_writable(path: Path) -> None:
    """Raises OSError where `path` cannot become a file, before anything is computed."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; a file is needed")
    place = path
    while not place.exists():
        place = place.parent
    if place != path and not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be created: {place} is not a directory")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission for {place}")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds, and vanishes when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; give the result the permissions that any new file has.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a JSON-lines log in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("ab") as log:
        log.write(text.encode())


def check_output(path: str | Path, suffix: str) -> Path:
    """A path for a result file, checked before anything is computed.

    Raises:
        ConfigError: another suffix than the content calls for.
        OSError: it could not be written.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ConfigError(f"--output={str(path)!r}: a {suffix} file is written here")
    _check_writable(path)
    return path
