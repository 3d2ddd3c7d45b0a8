"""The Markdown tables of `experiments.report`."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.shared import answers, runs
from experiments.shared.runs import Comparison, Run


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 2) -> str:
    """A table; columns behind the first `text_columns` are aligned to the right."""
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    # A bar would end the cell.
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "|".join(rule) + "|", *lines])


def number(value: float | None, spec: str = ".2f") -> str:
    """A formatted number, or "-" for None."""
    return "-" if value is None else format(value, spec)


def _names(run: Run) -> list[str]:
    return [run.weights, run.drafter]


def conditions(comparison: Comparison) -> str:
    """What the runs have in common, and the baseline."""
    first = comparison.runs[0].config
    machine = first["environment"]
    device = machine["cpu"] if machine["platform"] == "cpu" else machine["device_kind"]
    models = sorted({run.config["model"].rstrip("/").rpartition("/")[2] for run in comparison.runs})
    dtypes = sorted({run.config["dtype"] for run in comparison.runs})
    limits = sorted({run.config["max_new_tokens"] for run in comparison.runs})
    text = (
        f"{', '.join(models)} in {', '.join(dtypes)} on {device} ({machine['num_cpus']} processors), "
        f"up to {', '.join(map(str, limits))} new tokens per turn."
    )
    labels = {run.drafter: run.config["drafter_label"] for run in comparison.runs}
    text += "".join(f" {name}: {label}." for name, label in labels.items() if label != name)
    base = comparison.baseline
    if base is None:
        return text + " No run decodes plainly, so there are no speed-ups."
    return text + f" Speed-ups refer to {base.weights}, drafter {base.drafter} (`{base.name}`)."


def overall(comparison: Comparison) -> str:
    """Speed, acceptance and quality per run."""
    header = [
        *("weights", "drafter", "questions", "tokens/s", "speed-up", "median (quartiles)"),
        *("over plain", "acceptance length", "correct"),
    ]
    rows = []
    for run in comparison.runs:
        each = runs.ratios(run, comparison.baseline)
        middle = "-"
        if each.size:
            low, median, high = np.percentile(each, [25, 50, 75])
            middle = f"{median:.2f} ({low:.2f} - {high:.2f})"
        scored = answers.accuracy(run.rows)
        count = str(len(run.answered))
        if len(run.answered) < len(run.rows):
            count += f" (of {len(run.rows)})"
        rows.append(
            [
                *_names(run),
                count,
                number(answers.mean_speed(run.answered) if run.answered else None, ".1f"),
                number(runs.speedup(run, comparison.baseline)),
                middle,
                number(runs.speedup(run, comparison.plain_of(run))),
                number(answers.mean_accepted(run.answered)),
                "-"
                if scored is None
                else f"{scored[0]} of {scored[1]} ({scored[0] / scored[1]:.1%})",
            ]
        )
    return markdown(header, rows)


def categories(comparison: Comparison) -> str:
    """Speed-up per subtask and overall."""
    names = comparison.subtasks()
    rows = [
        [
            *_names(run),
            *(number(runs.speedup(run, comparison.baseline, name)) for name in names),
            number(runs.speedup(run, comparison.baseline)),
        ]
        for run in comparison.runs
    ]
    return markdown(["weights", "drafter", *names, "overall"], rows)


def acceptance(comparison: Comparison) -> str:
    """Share of steps by tokens per step, for runs that draft."""
    drafting = [run for run in comparison.runs if not run.is_plain]
    counts = [Counter(answers.accept_lengths(run.answered)) for run in drafting]
    deepest = max((max(count, default=1) for count in counts), default=0)
    if not deepest:
        return "No run drafts."
    rows = []
    for run, count in zip(drafting, counts, strict=True):
        total = max(sum(count.values()), 1)
        longest = max(count, default=0)
        shares = [
            f"{count[length] / total:.1%}" if length <= longest else "-"
            for length in range(1, deepest + 1)
        ]
        mean = answers.mean_accepted(run.answered)
        rows.append([*_names(run), str(sum(count.values())), number(mean), *shares])
    lengths = [str(length) for length in range(1, deepest + 1)]
    return markdown(["weights", "drafter", "steps", "mean", *lengths], rows)


def times(comparison: Comparison) -> str:
    """Seconds of prompts, decoding and compilation."""
    header = [
        "weights",
        "drafter",
        "prompts s",
        "decoding s",
        "compilation s",
        "new tokens",
        "steps",
    ]
    rows = []
    for run in comparison.runs:
        good = run.answered
        tokens = sum(sum(answers.choice(row)["new_tokens"]) for row in good)
        steps = sum(sum(answers.choice(row)["decoding_steps"]) for row in good)
        seconds = [
            answers.seconds(good, name) for name in ("prefill_ms", "decode_ms", "compile_ms")
        ]
        rows.append([*_names(run), *(f"{value:.1f}" for value in seconds), str(tokens), str(steps)])
    return markdown(header, rows)


def verify_times(found: Sequence[dict[str, Any]]) -> str:
    """Time of a target pass over n nodes, relative to one node."""
    sizes = sorted({size for row in found for size in row["num_nodes"]})
    rows = []
    for row in found:
        known = dict(zip(row["num_nodes"], row["verify_ms"], strict=True))
        one = known.get(1)
        cells = [number(known[n] / one if one and n in known else None) for n in sizes]
        rows.append([row["label"], number(one), *cells])
    return markdown(["weights", "T(1) ms", *(f"T({size})/T(1)" for size in sizes)], rows, 1)


def step_times(found: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of a step's parts."""
    parts = ("propose_ms", "verify_ms", "other_ms", "step_ms")
    rows = [
        [row["label"], str(row["num_nodes"]), *(number(row[name]) for name in parts)]
        for row in found
    ]
    return markdown(
        ["weights, drafter", "nodes", "draft ms", "verify ms", "other ms", "step ms"], rows, 1
    )


def similarity(found: Sequence[dict[str, Any]]) -> str:
    """How often two schemes choose the same token."""
    rows = [
        [
            *(row["label"], row["reference"], row["candidate"]),
            str(row["num_positions"]),
            f"{row['match_rate']:.1%}",
            f"{row['reference_confident']:.1%}",
            f"{row['match_rate_confident']:.1%}"
            if row["match_rate_confident"] is not None
            else "-",
        ]
        for row in found
    ]
    header = ["model", "reference", "candidate", "positions", "same token", "reference > 80 % sure"]
    return markdown([*header, "same token there"], rows, 3)
