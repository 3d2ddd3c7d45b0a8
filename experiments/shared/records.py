"""Files of results: rows that are appended and can be continued after an interruption, files that appear whole."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specjax.errors import ConfigError


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
