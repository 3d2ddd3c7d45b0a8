"""Tiles of the matmul kernels by trial: the fastest are written to specjax/pallas/tuned, weight by weight."""

import functools
import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import kernel_jobs
from experiments.shared import kernel_timing as timing
from specjax.aot import kernels
from specjax.errors import SpecjaxError
from specjax.pallas import device, tuned
from specjax.pallas.matmul import mosaic, specs, tiles
from specjax.pallas.matmul.plan import Config

_LINKS = 16
_logger = logging.getLogger(__name__)


def write_tuned(
    ops: Sequence[str],
    shapes: Sequence[str],
    counts: Sequence[int],
    dtype: str,
    gpu: device.Gpu,
    seconds: float,
    folder: Path | None = None,
) -> dict[Path, list[str]]:
    """Tries tiles for every weight of the shapes; writes those with the least time, summed over the rows.

    Args:
        seconds: after which nothing new is tried; a weight that was reached by then gets the best found so far.
        folder: of the tables; default: this package's.
    Returns:
        weights written, by file.

    Raises:
        SpecjaxError: the device was lost; what was written before stays.
    """
    deadline, written = time.monotonic() + seconds, {}
    folder = Path(tuned.__file__).parent if folder is None else folder
    for op in ops:
        if op not in kernels.MATMULS:
            continue
        path = folder / tuned.folder_name(gpu.kind) / f"{op}.json"
        entries = json.loads(path.read_text()) if path.is_file() else {}
        for name, spec in specs.of(op).items():
            if name.partition("/")[0] not in shapes or time.monotonic() > deadline:
                continue
            entry = _tuned_entry(op, spec, counts, dtype, gpu, deadline)
            if entry is None:
                _logger.warning("%s %s: no tiles ran on %s in the time given", op, name, gpu.kind)
                continue
            form = spec.weight().form
            key = tuned.weight_key(form.out_features, form.in_features, form.table_group)
            entries[key] = entry
            _write(path, entries)
            written.setdefault(path, []).append(name)
    return written


def _write(path: Path, entries: dict[str, Any]) -> None:
    text = json.dumps(entries, indent=1)
    tuned.parse(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _tuned_entry(op: str, spec, counts, dtype, gpu, deadline: float) -> dict[str, Any] | None:
    """The splits that are best over all row counts, and for each row tile the best steps and stages under them."""
    form, best = spec.weight().form, {}
    row_tiles = sorted({mosaic.m_tile(count, spec.operand_bits, gpu.arch) for count in counts})
    jobs = {tile: kernel_jobs.matmul_job(spec, tile, dtype, gpu.arch) for tile in row_tiles}
    copies = range(jobs[row_tiles[0]].copies)
    drawn = [kernel_jobs.draw_weight(spec, 2 + i) for i in copies]
    first = tiles.heuristic(form, row_tiles[0], spec.operand_bits, gpu).splits
    places = form.k_tiles // form.split_tiles
    # The heuristic's own first: what is known when time is up is at least that.
    options = dict.fromkeys(first + change for change in (0, -1, 1, -2, 2, 4))
    for splits in (s for s in options if 1 <= s <= places):
        total, rows = 0.0, {}
        for tile in row_tiles:
            weights = [jobs[tile].draw_weights(2 + i, drawn[i]) for i in copies]
            found = _best_config(jobs[tile], weights, form, splits, deadline)
            if found is None:
                break
            seconds, rows[str(tile)] = found
            total += seconds
        if len(rows) == len(row_tiles) and (not best or total < best["seconds"]):
            best = {"seconds": total, "splits": splits, "rows": rows}
    return {"splits": best["splits"], "rows": best["rows"]} if best else None


def _best_config(job, weights, form, splits: int, deadline: float):
    """(seconds, steps and stages) of the fastest tiles; None where none ran."""
    found = []
    x = job.draw_x(1)
    for steps, stages in itertools.product((1, 2, 4), (3, 4, 5, 6)):
        if form.split_tiles % steps or time.monotonic() > deadline:
            continue
        config = Config(tiles_per_step=steps, num_stages=stages, splits=splits)
        seconds = _time_config(job, x, weights, config)
        if seconds is not None:
            found.append((seconds, {"tiles_per_step": steps, "num_stages": stages}))
    return min(found, key=lambda pair: pair[0]) if found else None


def _time_config(job, x, weights, config: Config) -> float | None:
    """Seconds with these tiles; None where they do not compile, fit or run.

    Raises:
        SpecjaxError: nothing runs on the device any more.
    """
    kernel = functools.partial(job.kernel, config=config)
    try:
        return float(np.median(timing.seconds_per_call(kernel, x, weights, _LINKS)))
    except Exception as error:  # a refusal, or whatever lowering, a compiler or a launch raises
        _logger.info("%s: %s", config, error)
        if not timing.device_answers():
            raise SpecjaxError(f"{config}: the device was lost: {error}") from error
        return None
