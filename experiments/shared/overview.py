"""One figure that sums up a report: tokens/s of every drafter, per benchmark, beside each other for all weights.

It is drawn from report.md as `experiments.report` wrote it, so that it can be drawn where only the report is kept.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.shared import figures
from specjax.errors import ConfigError

_HEADER = re.compile(r"^\| weights \| drafter \| questions \| tokens/s \|")
_NAMES = {"none": "plain decoding"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A row of a report's first tables.

    Attributes:
        benchmark: heading of the table.
        weights: scheme of the weights.
        drafter: who drafts; "none" is plain decoding.
        tokens_per_s: mean over the questions.
    """

    benchmark: str
    weights: str
    drafter: str
    tokens_per_s: float


def read(path: Path) -> tuple[list[Speed], str]:
    """The speeds of a report, and what it says about model and machine.

    Raises:
        ConfigError: there is no table of speeds, or it has gaps.
        OSError: the file cannot be read.
    """
    rows, benchmark, conditions, inside = [], "", "", False
    for line in path.read_text(encoding="utf-8").splitlines():
        inside = bool(_HEADER.match(line)) or (inside and line.startswith("|"))
        if line.startswith("## "):
            benchmark = line[3:]
        elif inside and not _HEADER.match(line) and "---" not in line:
            weights, drafter, _, speed = (cell.strip() for cell in line.split("|")[1:5])
            if speed == "-":
                raise ConfigError(f"{path}: {benchmark}, {weights}, {drafter}: tokens/s is missing")
            rows.append(
                Speed(
                    benchmark=benchmark,
                    weights=weights,
                    drafter=drafter,
                    tokens_per_s=float(speed),
                )
            )
        elif not conditions and ", up to " in line:
            conditions = line.partition(", up to ")[0]
    if not rows:
        raise ConfigError(f"{path}: no table of speeds; a report.md of experiments.report has one")
    return rows, conditions


def draw(rows: Sequence[Speed], conditions: str):
    """Bars of tokens/s: a panel per weights, a group per benchmark, a colour per drafter."""
    from matplotlib.figure import Figure

    weights, drafters, benchmarks = (
        list(dict.fromkeys(getattr(row, name) for row in rows))
        for name in ("weights", "drafter", "benchmark")
    )
    width = max(3.2, 0.6 + 0.42 * len(drafters) * len(benchmarks))
    figure = Figure(figsize=(width * len(weights), 3.1), layout="constrained")
    panels = figure.subplots(1, len(weights), sharey=True, squeeze=False)[0]
    speeds = {(row.weights, row.drafter, row.benchmark): row.tokens_per_s for row in rows}
    for axes, wanted in zip(panels, weights, strict=True):
        for index, drafter in enumerate(drafters):
            shift = (index - (len(drafters) - 1) / 2) * 0.26
            found = [
                (group + shift, speeds[wanted, drafter, name])
                for group, name in enumerate(benchmarks)
                if (wanted, drafter, name) in speeds
            ]
            bars = axes.bar(
                *zip(*found, strict=True),
                0.24,
                color=figures.COLOURS[index],
                label=_NAMES.get(drafter, drafter),
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1.5)
        axes.set_xticks(range(len(benchmarks)), benchmarks)
        axes.set_title(f"{wanted} weights", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("tokens/s")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.supxlabel(conditions, fontsize=8, color="0.35")
    return figure
