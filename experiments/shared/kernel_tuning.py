"""Tiles of the matmul kernels by trial: the fastest are written to specjax/pallas/tuned, weight by weight."""

import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specjax.aot import kernels
from specjax.doctor import workers
from specjax.errors import SpecjaxError
from specjax.pallas import device, tuned
from specjax.pallas.matmul import mosaic, specs, tiles

_logger = logging.getLogger(__name__)


class Clock:
    """Time that runs out; None: it does not."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def up(self) -> bool:
        """It has."""
        return self._end is not None and time.monotonic() >= self._end

    def at_most(self, seconds: float) -> float:
        """So many, or what is left."""
        return (
            seconds if self._end is None else max(0.0, min(seconds, self._end - time.monotonic()))
        )


def write_tuned(
    ops: Sequence[str],
    shapes: Sequence[str],
    counts: Sequence[int],
    gpu: device.Gpu,
    worker,
    seconds: float,
    kernel_seconds: float = 120.0,
    folder: str | Path | None = None,
) -> dict[Path, list[str]]:
    """Tries tiles for every weight of the shapes; writes those with the least time, summed over the rows.

    Args:
        worker: answers as `kernel_server.Server` does, in a process that tiles which hang or fault may take down.
        seconds: after which nothing new is tried; a weight that was reached by then gets the best found so far.
        kernel_seconds: for tiles that hang.
        folder: of the tables; default: this package's.
    Returns:
        weights written, by file.

    Raises:
        SpecjaxError: the device was lost; what was written before stays.
    """
    clock, written = Clock(seconds), {}
    folder = Path(tuned.__file__).parent if folder is None else Path(folder)
    for op in ops:
        if op not in kernels.MATMULS:
            continue
        path = folder / tuned.folder_name(gpu.kind) / f"{op}.json"
        entries = json.loads(path.read_text()) if path.is_file() else {}
        for name, spec in specs.of(op).items():
            if name.partition("/")[0] not in shapes or clock.up:
                continue
            trial = _Trial(worker, {"op": op, "shape": name}, kernel_seconds, clock)
            entry = _tuned_entry(spec, counts, gpu, trial)
            if entry is None:
                _logger.warning("%s %s: no tiles ran on %s in the time given", op, name, gpu.kind)
                continue
            form = spec.weight().form
            key = tuned.weight_key(form.out_features, form.in_features, form.table_group)
            entries[key] = entry
            _write(path, entries)
            written.setdefault(path, []).append(name)
    return written


class _Trial:
    """Times tiles of one weight."""

    def __init__(self, worker, facts: dict[str, Any], kernel_seconds: float, clock: Clock):
        self._worker, self._facts = worker, facts
        self._seconds, self.clock = kernel_seconds, clock

    def __call__(self, rows: int, config: dict[str, int]) -> float | None:
        """Seconds; None where these tiles do not compile, fit or run.

        Raises:
            SpecjaxError: nothing runs on the device any more.
        """
        request = self._facts | {"rows": rows, "config": config}
        try:
            answer = self._worker.ask(request, self.clock.at_most(self._seconds))
        except workers.Lost as error:
            answer = {"error": str(error)}
        if "error" in answer:
            _logger.info("%s: %s", config, answer["error"])
            if answer.get("device_lost"):
                raise SpecjaxError(f"{config}: the device was lost: {answer['error']}")
            self._worker.close()
        return answer.get("seconds")


def _write(path: Path, entries: dict[str, Any]) -> None:
    text = json.dumps(entries, indent=1)
    tuned.parse(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _tuned_entry(spec, counts, gpu, trial: _Trial) -> dict[str, Any] | None:
    """The splits that are best over all row counts, and for each row tile the best steps and stages under them."""
    form, best = spec.weight().form, {}
    row_tiles = sorted({mosaic.m_tile(count, spec.operand_bits, gpu.arch) for count in counts})
    first = tiles.heuristic(form, row_tiles[0], spec.operand_bits, gpu).splits
    places = form.k_tiles // form.split_tiles
    # The heuristic's own first: what is known when time is up is at least that.
    options = dict.fromkeys(first + change for change in (0, -1, 1, -2, 2, 4))
    for splits in (s for s in options if 1 <= s <= places):
        total, rows = 0.0, {}
        for tile in row_tiles:
            found = _best_config(tile, form, splits, trial)
            if found is None:
                break
            seconds, rows[str(tile)] = found
            total += seconds
        if len(rows) == len(row_tiles) and (not best or total < best["seconds"]):
            best = {"seconds": total, "splits": splits, "rows": rows}
    return {"splits": best["splits"], "rows": best["rows"]} if best else None


def _best_config(tile: int, form, splits: int, trial: _Trial):
    """(seconds, steps and stages) of the fastest tiles; None where none ran."""
    found = []
    for steps, stages in itertools.product((1, 2, 4), (3, 4, 5, 6)):
        if form.split_tiles % steps or trial.clock.up:
            continue
        config = {"tiles_per_step": steps, "num_stages": stages}
        seconds = trial(tile, config | {"splits": splits})
        if seconds is not None:
            found.append((seconds, config))
    return min(found, key=lambda pair: pair[0]) if found else None
