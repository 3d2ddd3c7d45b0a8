"""Figures of runs that are compared, with matplotlib, which is imported when a figure is drawn."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments.shared import answers, records, runs
from experiments.shared.runs import Comparison, Run
from specjax.errors import ConfigError

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's palette: told apart with any kind of colour vision.
COLOURS = ("#7f7f7f", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")


def require() -> None:
    """Raises ConfigError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "figures need matplotlib: pip install specjax[report], or pass --nofigures"
        ) from None
    matplotlib.use("Agg")


def new_axes(width: float, height: float = 3.4):
    """A figure with one pair of axes in the style of all."""
    figure, [axes] = _panels(1, width, height)
    return figure, axes


def _panels(count: int, width: float, height: float):
    """A figure with `count` pairs of axes, one below the other, with the same scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * count), layout="constrained")
    grid = figure.subplots(count, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, grid


def save(figure, folder: Path, name: str, formats: Sequence[str]) -> list[str]:
    """Writes a figure in every format; returns the file names."""
    import matplotlib

    files = []
    # Fixed ids and no date: the same data give the same file.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        for suffix in formats:
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
            with records.atomic(folder / f"{name}.{suffix}") as path:
                figure.savefig(path, format=suffix, dpi=160, metadata=metadata)
            files.append(f"{name}.{suffix}")
    return files


def colour_of(labels: Sequence[str]) -> dict[str, str]:
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(labels)}


def _grouped_bars(
    axes,
    groups: Sequence[str],
    series: dict[str, list[float | None]],
    text: Callable[[str, int, float], str],
    colours: dict[str, str],
) -> None:
    """Bars side by side in groups, each with `text(series, group, height)` on top."""
    width = min(0.8 / max(len(series), 1), 0.3)
    for index, (label, heights) in enumerate(series.items()):
        shift = (index - (len(series) - 1) / 2) * width
        known = [(group, y) for group, y in enumerate(heights) if y is not None]
        places, values = [group + shift for group, _ in known], [y for _, y in known]
        bars = axes.bar(places, values, 0.92 * width, label=label, color=colours[label])
        texts = [text(label, group, y) for group, y in known]
        size = 7 if len(groups) * len(series) <= 24 else 5.5
        axes.bar_label(bars, texts, fontsize=size, padding=1.5)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.14)


def legend(axes, columns: int = 4) -> None:
    """A legend above the axes, where it hides nothing."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=min(columns, len(handles)),
            frameon=False,
            fontsize=8,
        )


def speedups(comparison: Comparison):
    """Speed-up of every weights x drafter over the baseline, as in the reference's overall chart. None without one.

    The second line on a bar is the gain over plain decoding of the same weights.
    """
    base = comparison.baseline
    if base is None:
        return None
    weights, drafters = _names(comparison.runs)
    by_name = {(run.weights, run.drafter): run for run in comparison.runs}
    value = {name: runs.speedup(run, base) for name, run in by_name.items()}

    def text(drafter: str, group: int, height: float) -> str:
        run = by_name[weights[group], drafter]
        gain = None if run.is_plain else runs.speedup(run, comparison.plain_of(run))
        return f"{height:.2f}" if gain is None else f"{height:.2f}\n↑{gain:.2f}"

    series = {d: [value.get((w, d)) for w in weights] for d in drafters}
    figure, axes = new_axes(max(4.2, 1.2 + 0.5 * len(weights) * (len(drafters) + 0.6)))
    _grouped_bars(axes, weights, series, text, colour_of(drafters))
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_ylabel(f"speed-up over {base.weights}, {base.drafter}", fontsize=8)
    legend(axes, 3)
    return figure


def _names(found: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Weights and drafters in order of appearance."""
    return list(dict.fromkeys(r.weights for r in found)), list(
        dict.fromkeys(r.drafter for r in found)
    )


def categories(comparison: Comparison):
    """Speed-up per category, a panel per weights. None without a baseline, or with one category."""
    names = comparison.subtasks()
    if comparison.baseline is None or len(names) < 2 or len(comparison.runs) < 2:
        return None
    weights, drafters = _names(comparison.runs)
    colours = colour_of(drafters)
    width = max(5.0, 1.0 + (0.28 * len(drafters) + 0.3) * (len(names) + 1))
    figure, panels = _panels(len(weights), width, 2.1)
    for axes, wanted in zip(panels, weights, strict=True):
        series = {
            run.drafter: [runs.speedup(run, comparison.baseline, name) for name in [*names, None]]
            for run in comparison.runs
            if run.weights == wanted
        }
        two = lambda label, group, height: f"{height:.2f}"
        _grouped_bars(axes, [*names, "overall"], series, two, colours)
        axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_ylabel(f"speed-up,\n{wanted}", fontsize=8)
    panels[-1].tick_params("x", rotation=25)
    legend(panels[0], 3)
    return figure


def acceptance(comparison: Comparison):
    """Share of steps by tokens per step, a panel per drafter. None where nothing was drafted."""
    drafting = [run for run in comparison.runs if not run.is_plain and run.answered]
    if not drafting:
        return None
    weights, drafters = _names(drafting)
    counts = {id(run): Counter(answers.accept_lengths(run.answered)) for run in drafting}
    deepest = max(max(count, default=1) for count in counts.values())
    width = max(4.8, 1.2 + 0.2 * deepest * (len(weights) + 1.5))
    figure, panels = _panels(len(drafters), width, 2.1)
    for axes, wanted in zip(panels, drafters, strict=True):
        series, means = {}, {}
        for run in drafting:
            if run.drafter == wanted:
                count = counts[id(run)]
                total = max(sum(count.values()), 1)
                series[run.weights] = [100 * count[n] / total for n in range(1, deepest + 1)]
                means[run.weights] = answers.mean_accepted(run.answered)
        whole = lambda label, group, height: f"{height:.0f}" if height >= 0.5 else ""
        _grouped_bars(
            axes, list(map(str, range(1, deepest + 1))), series, whole, colour_of(weights)
        )
        axes.set_ylabel("steps, %")
        known = [f"{name} {mean:.2f}" for name, mean in means.items() if mean is not None]
        text = f"{wanted}\nmean: {', '.join(known)}"
        axes.text(0.99, 0.95, text, transform=axes.transAxes, ha="right", va="top", fontsize=7)
    panels[-1].set_xlabel("tokens per step, bonus included")
    if len(weights) > 1:
        legend(panels[0], 4)
    return figure


def quality(comparison: Comparison):
    """Share of right answers beside speed: colours are weights, markers drafters. None where nothing was scored."""
    from matplotlib.lines import Line2D

    scored = [(run, answers.accuracy(run.rows)) for run in comparison.runs if run.answered]
    scored = [(run, found) for run, found in scored if found is not None]
    if not scored:
        return None
    weights, drafters = _names([run for run, _ in scored])
    colours = colour_of(weights)
    markers = {name: "osD^vPX*"[index % 8] for index, name in enumerate(drafters)}
    figure, axes = new_axes(6.4, 3.4)
    for run, (right, count) in scored:
        share = right / count
        axes.errorbar(
            answers.mean_speed(run.answered),
            100 * share,
            yerr=100 * np.sqrt(share * (1 - share) / count),
            marker=markers[run.drafter],
            color=colours[run.weights],
            markersize=6,
            capsize=2.5,
            linewidth=0.9,
            clip_on=False,
            zorder=3,
        )
    none = {"linestyle": "none"}
    handles = [Line2D([], [], color=colours[w], marker="o", label=w, **none) for w in weights]
    handles += [Line2D([], [], color="0.3", marker=markers[d], label=d, **none) for d in drafters]
    axes.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8
    )
    axes.set_xlabel("tokens/s")
    axes.set_ylabel("correct, % (± one standard error)", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return figure
