"""Tables and figures from result files; runs no model.

    python -m experiments.report --inputs=DIR,FILE --output=DIR
    python -m experiments.report --overview=experiments/results/smollm2_benchmarks/report.md --output=docs --formats=png

The second line draws OUTPUT/overview.png from a report that is there: tokens/s of all its runs in one figure. Inputs
are files (or directories of files) of JSON lines from `experiments.evaluate`, `experiments.step_times` and
`experiments.similarity`. OUTPUT gets report.md and its figures.

A run's speed-up is the ratio of mean speeds (each the unweighted mean over questions, as the reference defines it) to
the baseline's, over the questions that both answered; beside it stand median and quartiles of the questions' own
ratios. The baseline is --baseline, else plain decoding of dense weights, else the first run with plain decoding.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments.shared import (
    common,
    figures,
    figures_measured,
    flag_groups,
    overview,
    records,
    runs,
    tables,
)
from experiments.shared.runs import Results
from specjax.errors import ConfigError


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_list("inputs", [], "Result files, or directories of them.", flag_values=values)
        flags.DEFINE_string(
            "overview", None, "A report.md to sum up instead, in one figure.", flag_values=values
        )
        flags.DEFINE_string(
            "baseline", None, "Name of the run that speed-ups refer to.", flag_values=values
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "Directory for the report.", flag_values=values)
        flags.DEFINE_string("title", "Report", "Heading.", flag_values=values)
        flags.DEFINE_list("formats", ["png", "svg"], "Of the figures.", flag_values=values)
        flags.DEFINE_boolean(
            "figures", True, "Draw figures (needs matplotlib).", flag_values=values
        )
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Reads, draws, writes."""
    wrong = [name for name in values.formats if name not in figures.FORMATS]
    if wrong or not values.formats:
        raise ConfigError(
            f"--formats={','.join(values.formats)}: supported are {', '.join(figures.FORMATS)}"
        )
    if bool(values.inputs) == (values.overview is not None):
        raise ConfigError("give either --inputs=FILES or --overview=REPORT.md")
    if values.figures or values.overview:
        figures.require()
    if values.overview:
        _overview(Path(values.overview), Path(values.output), values.formats)
        return
    results = runs.read([Path(name) for name in values.inputs], values.baseline)
    folder = Path(values.output)
    drawn: dict[str, str] = {}
    if values.figures:
        drawn = {
            name: file
            for name, figure in _figures(results).items()
            for file in figures.save(figure, folder, name, values.formats)[:1]
        }
    with records.atomic(folder / "report.md") as path:
        path.write_text(_markdown(results, drawn, values.title), encoding="utf-8")
    print(f"{len(results.runs)} runs, {len(drawn)} figures -> {folder / 'report.md'}")


def _overview(report: Path, folder: Path, formats: Sequence[str]) -> None:
    """One figure from a report."""
    files = figures.save(overview.draw(*overview.read(report)), folder, "overview", formats)
    print(f"{report} -> {', '.join(str(folder / name) for name in files)}")


def _figures(results: Results) -> dict:
    """Figures by file name; those without data are left out."""
    drawn = {}
    for benchmark, found in results.by_benchmark().items():
        drawn[f"{benchmark}_speedup"] = figures.speedups(found)
        drawn[f"{benchmark}_categories"] = figures.categories(found)
        drawn[f"{benchmark}_acceptance"] = figures.acceptance(found)
        drawn[f"{benchmark}_quality"] = figures.quality(found)
    drawn["verify_times"] = figures_measured.verify_times(results.verify_times)
    drawn["time_split"] = figures_measured.time_split(results.step_times)
    for index, row in enumerate(results.similarities):
        drawn[f"similarity_{index}"] = figures_measured.similarity(row)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _markdown(results: Results, drawn: dict[str, str], title: str) -> str:
    parts = [f"# {title}"]
    for benchmark, found in results.by_benchmark().items():
        parts += [f"## {benchmark}", tables.conditions(found), tables.overall(found)]
        parts += _shown(drawn, benchmark, "speedup", "quality")
        if len(found.subtasks()) > 1:
            parts += ["### Speed-up by category", tables.categories(found)]
            parts += _shown(drawn, benchmark, "categories")
        parts += [
            "### Acceptance",
            tables.acceptance(found),
            *_shown(drawn, benchmark, "acceptance"),
        ]
        parts += ["### Time", tables.times(found)]
    if results.verify_times:
        parts += ["## Cost of verification", tables.verify_times(results.verify_times)]
        parts += _shown(drawn, "verify", "times")
    if results.step_times:
        parts += ["## Where a step's time goes", tables.step_times(results.step_times)]
        parts += _shown(drawn, "time", "split")
    if results.similarities:
        parts += ["## Agreement of schemes", tables.similarity(results.similarities)]
        parts += _shown(drawn, "similarity", *map(str, range(len(results.similarities))))
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(drawn: dict[str, str], prefix: str, *names: str) -> Sequence[str]:
    keys = [f"{prefix}_{name}" for name in names]
    return [f"![{key.replace('_', ' ')}]({drawn[key]})" for key in keys if key in drawn]


if __name__ == "__main__":
    common.run(define_flags, main)
