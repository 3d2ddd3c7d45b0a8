"""Result files as runs that can be compared."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import answers, naming
from specjax.errors import ConfigError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Answers of one configuration to one benchmark.

    Attributes:
        rows: all rows; `answered` those that count.
        by_id: answered rows by question.
        drafter_name: short, and different from that of other drafters among the results.
    """

    rows: list[answers.Row]
    answered: list[answers.Row]
    by_id: dict[Any, answers.Row]
    drafter_name: str

    @property
    def config(self) -> dict[str, Any]:
        return self.rows[0]["config"]

    @property
    def name(self) -> str:
        return self.config["run_name"]

    @property
    def weights(self) -> str:
        return self.config["weights"]

    @property
    def drafter(self) -> str:
        """The drafter's name, with what makes its output differ from the target's."""
        lossless = all(turn.get("lossless", True) for row in self.rows for turn in row["metrics"])
        return self.drafter_name + ("" if lossless else " (lossy)")

    @property
    def is_plain(self) -> bool:
        return self.config["drafter"]["kind"] == "none"

    def subtask(self, name: str | None) -> list[answers.Row]:
        """Answered rows of a subtask; None: all."""
        return [row for row in self.answered if name is None or row["subtask"] == name]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs of one benchmark.

    Attributes:
        runs: those with plain decoding first.
        baseline: what speed-ups refer to; None where no run decodes plainly.
    """

    runs: list[Run]
    baseline: Run | None

    def subtasks(self) -> list[str]:
        """In the order of the data."""
        return list(dict.fromkeys(row["subtask"] for run in self.runs for row in run.answered))

    def plain_of(self, run: Run) -> Run | None:
        """Plain decoding of the same weights."""
        same = ("model", "weights", "scheme", "dtype", "max_new_tokens")
        for other in self.runs:
            alike = all(other.config.get(n) == run.config.get(n) for n in same)
            if other.is_plain and alike and _depth(other) == _depth(run):
                return other
        return None


def _depth(run: Run) -> str:
    """Whether tokens skip layers; who decides it in trees is no matter of plain decoding."""
    return (run.config.get("depth") or {}).get("depth", "auto")


def ratios(run: Run, base: Run | None, subtask: str | None = None) -> np.ndarray:
    """Speeds of the questions that both runs answered over those of the baseline; empty without one."""
    pairs = _pairs(run, base, subtask)
    return np.asarray([answers.speed(mine) / answers.speed(theirs) for mine, theirs in pairs])


def speedup(run: Run, base: Run | None, subtask: str | None = None) -> float | None:
    """Ratio of mean speeds over the questions that both runs answered; None without any."""
    pairs = _pairs(run, base, subtask)
    if not pairs:
        return None
    mine, theirs = zip(*pairs, strict=True)
    return answers.mean_speed(mine) / answers.mean_speed(theirs)


def _pairs(run: Run, base: Run | None, subtask: str | None):
    if base is None:
        return []
    rows = run.subtask(subtask)
    return [(row, base.by_id[row["id"]]) for row in rows if row["id"] in base.by_id]


@dataclass(kw_only=True)
class Results:
    """What result files hold.

    Attributes:
        runs: of `experiments.evaluate`.
        verify_times, step_times: rows of `experiments.step_times`.
        similarities: summary rows of `experiments.similarity`.
        baseline: name of the run that speed-ups refer to, or None.
    """

    runs: list[Run] = field(default_factory=list)
    verify_times: list[dict[str, Any]] = field(default_factory=list)
    step_times: list[dict[str, Any]] = field(default_factory=list)
    similarities: list[dict[str, Any]] = field(default_factory=list)
    baseline: str | None = None

    def by_benchmark(self) -> dict[str, Comparison]:
        """Comparable runs by benchmark."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.config["benchmark"], []).append(run)
        return {name: self._compare(each) for name, each in sorted(found.items())}

    def _compare(self, found: list[Run]) -> Comparison:
        ordered = sorted(found, key=lambda r: (r.weights != "dense", r.weights, not r.is_plain))
        plain = [run for run in ordered if run.is_plain]
        named = [run for run in ordered if run.name == self.baseline]
        return Comparison(runs=ordered, baseline=next(iter(named or plain), None))


def read(inputs: Sequence[Path], baseline: str | None = None) -> Results:
    """Reads result files and directories of them.

    Raises:
        FileNotFoundError: an input does not exist.
        ConfigError: a file is damaged, nothing is there to report, a run occurs twice, or no run is called `baseline`.
    """
    results = Results(baseline=baseline)
    kinds = {
        "verify_times": results.verify_times,
        "step_times": results.step_times,
        "similarity": results.similarities,
    }
    found: dict[tuple[str, str], list[answers.Row]] = {}
    origin: dict[tuple[str, str], Path] = {}
    for path in _files(inputs):
        for row in _rows(path):
            if "choices" in row and "run_name" in row.get("config", {}):
                key = (row["config"]["benchmark"], row["config"]["run_name"])
                if origin.setdefault(key, path) != path:
                    raise ConfigError(
                        f"run {key[1]!r} of {key[0]} is in both {origin[key]} and {path}"
                    )
                found.setdefault(key, []).append(row)
            elif row.get("record") in kinds:
                kinds[row["record"]].append(row)
    names = naming.short_names([rows[0]["config"]["drafter"] for rows in found.values()])
    results.runs = [_run(*each) for each in zip(found.values(), names, strict=True)]
    results.step_times = _newest(_named(results.step_times))
    results.verify_times = _newest(results.verify_times)
    if not results.runs and not any(kinds.values()):
        raise ConfigError(f"--inputs={','.join(map(str, inputs))}: no results to report")
    if baseline is not None and baseline not in {run.name for run in results.runs}:
        names = ", ".join(sorted({run.name for run in results.runs}))
        raise ConfigError(f"--baseline={baseline!r}: there is no such run; there are: {names}")
    return results


def _named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of steps, labelled with the shortest names that tell their drafters apart."""
    configs = [row["config"] for row in rows]
    names = naming.short_names([config["drafter"] for config in configs])
    return [
        row | {"label": f"{config['weights']}, {name}"}
        for row, config, name in zip(rows, configs, names, strict=True)
    ]


def _newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that measured the same the last, in the order in which they occurred first."""

    def measured(row):
        config = row.get("config", {})
        return row["label"], *(config.get(name) for name in ("model", "dtype", "batch_size"))

    return list({measured(row): row for row in rows}.values())


def _files(inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"--inputs: {path} does not exist")
        files += sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    return list(dict.fromkeys(file.resolve() for file in files))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a last line that an interruption cut short is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from None
    lines = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == lines[-1][0] and rows:
                _log.warning("%s:%d: cut short by an interruption; left out", path, number)
                break
            raise ConfigError(f"{path}:{number}: not valid JSON: {error}") from None
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _run(rows: list[answers.Row], drafter_name: str) -> Run:
    good = answers.answered(rows)
    by_id = {row["id"]: row for row in good}
    return Run(rows=rows, answered=good, by_id=by_id, drafter_name=drafter_name)
