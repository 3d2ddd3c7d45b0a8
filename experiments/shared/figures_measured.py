"""Figures of measurements that stand alone: times of passes and steps, agreement of schemes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.shared import figures


def verify_times(found: Sequence[dict[str, Any]]):
    """T_verify(n) / T_verify(1). None without data."""
    curves = [row for row in found if 1 in row["num_nodes"]]
    if not curves:
        return None
    figure, axes = figures.new_axes(4.8)
    colours = figures.colour_of([row["label"] for row in curves])
    for row in curves:
        times = np.asarray(row["verify_ms"])
        one = times[row["num_nodes"].index(1)]
        label, colour = row["label"], colours[row["label"]]
        axes.plot(row["num_nodes"], times / one, marker="o", label=label, color=colour)
    ticks = sorted({size for row in curves for size in row["num_nodes"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("nodes n")
    axes.set_ylabel("T(n) / T(1)")
    figures.legend(axes, 2)
    return figure


def time_split(found: Sequence[dict[str, Any]]):
    """Parts of a step's time, as stacked bars. None without data."""
    if not found:
        return None
    figure, axes = figures.new_axes(6.0, 0.9 + 0.42 * len(found))
    left = np.zeros(len(found))
    parts = {"draft": "propose_ms", "verify": "verify_ms", "other": "other_ms"}
    for (label, name), colour in zip(parts.items(), ("#E69F00", "#0072B2", "#bbbbbb"), strict=True):
        widths = np.asarray([max(row[name], 0.0) for row in found])
        axes.barh(range(len(found)), widths, left=left, label=label, color=colour, height=0.62)
        left += widths
    axes.set_yticks(range(len(found)), [row["label"] for row in found], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_xlabel("ms per step")
    figures.legend(axes, 3)
    return figure


def similarity(row: dict[str, Any]):
    """Joint histograms of the probabilities of two schemes' first choices, where they agree and where not."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    same, other = (np.asarray(row[f"histogram_{name}"], float) for name in ("same", "other"))
    norm = LogNorm(vmin=1, vmax=max(same.max(), other.max(), 2))
    for axes, counts, name in zip(
        panels, (same, other), ("same token", "another token"), strict=True
    ):
        shown = np.ma.masked_equal(counts.T, 0)
        image = axes.imshow(shown, origin="lower", extent=(0, 1, 0, 1), norm=norm, cmap="viridis")
        axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, linestyle="--")
        share = counts.sum() / row["num_positions"]
        axes.set_title(f"{name}: {share:.1%} of {row['num_positions']}", fontsize=9)
        axes.set_xlabel(f"top probability, {row['reference']}")
    panels[0].set_ylabel(f"top probability, {row['candidate']}")
    figure.colorbar(image, ax=panels, label="positions", shrink=0.85)
    return figure
