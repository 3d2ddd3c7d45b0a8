"""Ways of generating compared on the same prompts: everybody takes turns, so that a drifting machine hits all alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import specjax
from experiments.shared import tables

SPEED_HEADERS = ("tokens/s", "quartiles", "speed-up", "acceptance length")


@dataclass(kw_only=True)
class Contestant:
    """A way of generating, and what was measured of it.

    Attributes:
        name: as printed.
        facts: columns that tell its rows apart.
        model: who generates.
        drafter: built for it.
        runs: per repeat the results of every group; the first repeat is the warm-up.
    """

    name: str
    facts: dict[str, Any]
    model: specjax.LanguageModel
    drafter: Any
    runs: list[list[list[specjax.GenerationResult]]] = field(default_factory=list)

    @property
    def outputs(self) -> list[list[int]]:
        """Tokens of every prompt, of the warm-up."""
        return [result.output_ids for group in self.runs[0] for result in group]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Metrics of every counted round."""
        return [total_metrics(groups) for groups in self.runs[1:]]


def measure(
    contestants: Sequence[Contestant],
    prompts: Sequence[list[int]],
    repeats: int,
    options: dict[str, Any],
) -> None:
    """Fills in the runs: a warm-up and `repeats` counted rounds over all prompts, in an order that rotates."""
    size = options["batch_size"]
    starts = range(0, len(prompts), size)
    total = (repeats + 1) * len(starts) * len(contestants)
    with tqdm(total=total, unit="run", disable=None) as bar:
        for repeat in range(repeats + 1):
            for contestant in contestants:
                contestant.runs.append([])
            for start in starts:
                shift = repeat % len(contestants)
                for contestant in [*contestants[shift:], *contestants[:shift]]:
                    bar.set_postfix_str(("warm-up " if repeat == 0 else "") + contestant.name)
                    group = prompts[start : start + size]
                    numbers = range(start, start + len(group))
                    results = contestant.model.generate_iter(
                        group, contestant.drafter, request_ids=numbers, **options
                    )
                    ordered = sorted(results, key=lambda pair: pair[0])
                    contestant.runs[-1].append([result for _, result in ordered])
                    bar.update()


def total_metrics(groups: Sequence[Sequence[specjax.GenerationResult]]) -> dict[str, Any]:
    """Metrics of one round over all groups.

    The requests of a group start together, so its time is that of the one that ran longest.
    """
    each = [result.metrics for group in groups for result in group]
    longest = [max(group, key=lambda result: result.metrics.decode_ms).metrics for group in groups]
    decode_ms = sum(metrics.decode_ms for metrics in longest)
    total = specjax.Metrics(
        num_spec_steps=sum(metrics.num_spec_steps for metrics in each),
        num_draft_tokens=sum(metrics.num_draft_tokens for metrics in each),
        acceptance_histogram=_sums(each, "acceptance_histogram"),
        prefill_ms=sum(metrics.prefill_ms for metrics in longest),
        decode_ms=decode_ms,
        compile_ms=sum(metrics.compile_ms for metrics in longest),
        batch_size=each[0].batch_size,
        new_tokens=sum(metrics.new_tokens for metrics in each),
        lossless=each[0].lossless,
        quarantine=each[0].quarantine,
        layer_runs=_sums(each, "layer_runs"),
        inner_acceptance_histogram=_sums(each, "inner_acceptance_histogram"),
    )
    # Every request's first token is prefill's.
    decoded = total.new_tokens - len(each)
    rate = decoded / decode_ms * 1e3 if decode_ms > 0 else None
    return total.to_dict() | {"tokens_per_s": rate}


def _sums(each: Sequence[specjax.Metrics], name: str) -> tuple[int, ...] | None:
    """Histograms added up; None where they are."""
    rows = [getattr(metrics, name) for metrics in each]
    return None if None in rows else tuple(np.sum(rows, axis=0).tolist())


def run_rows(contestant: Contestant, ids: Sequence[Any]) -> list[dict[str, Any]]:
    """One row per counted round."""
    names = ("new_tokens", "num_spec_steps", "decode_ms")
    rows = []
    for repeat, groups in enumerate(contestant.runs[1:]):
        results = [result for group in groups for result in group]
        per_prompt = [
            {"id": key} | {name: getattr(result.metrics, name) for name in names}
            for key, result in zip(ids, results, strict=True)
        ]
        row = {"record": "run", **contestant.facts, "repeat": repeat, **total_metrics(groups)}
        rows.append(row | {"per_prompt": per_prompt})
    return rows


def summarize(
    contestant: Contestant,
    baseline: Contestant,
    baseline_name: str,
    reference: Contestant | None = None,
) -> dict[str, Any]:
    """Medians over the counted rounds; the speed-up is the median of the rounds' own ratios to the baseline.

    Args:
        reference: whose outputs the contestant's should equal; default: the baseline.
    """
    rounds = contestant.rounds
    rates = [metrics["tokens_per_s"] for metrics in rounds]
    base = [metrics["tokens_per_s"] for metrics in baseline.rounds]
    known = None not in rates and None not in base
    pairs = zip(contestant.outputs, (reference or baseline).outputs, strict=True)
    return rounds[0] | {
        "record": "summary",
        **contestant.facts,
        "repeats": len(rounds),
        "tokens_per_s": float(np.median(rates)) if known else None,
        "tokens_per_s_quartiles": np.percentile(rates, [25, 75]).tolist() if known else None,
        "tokens_per_s_range": [min(rates), max(rates)] if known else None,
        "speedup": float(np.median(np.divide(rates, base))) if known else None,
        "num_prompts": len(contestant.outputs),
        f"outputs_equal_to_{baseline_name}": sum(mine == theirs for mine, theirs in pairs),
        "warmup_compile_ms": total_metrics(contestant.runs[0])["compile_ms"],
    }


def speed_cells(row: dict[str, Any]) -> list[str]:
    """A summary under `SPEED_HEADERS`."""
    quartiles = row["tokens_per_s_quartiles"]
    return [
        tables.number(row["tokens_per_s"], ".1f"),
        "-" if quartiles is None else f"{quartiles[0]:.1f} - {quartiles[1]:.1f}",
        tables.number(row["speedup"]),
        tables.number(row["mean_acceptance_length"]),
    ]


def equal_cell(row: dict[str, Any], baseline_name: str) -> str:
    """Whether all outputs of a summary were the baseline's."""
    equal, count = row[f"outputs_equal_to_{baseline_name}"], row["num_prompts"]
    return "yes" if equal == count else f"no ({equal} of {count})"


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table; where there is no terminal, 120 columns wide."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
