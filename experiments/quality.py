"""Perplexity of a model under every scheme and method that its shapes allow, beside its dense source.

    python -m experiments.quality --model=smollm2-135m --text_file=text.jsonl --output=quality.jsonl --table=quality.md

Documents of the text are dealt out in turn: odd ones calibrate, even ones evaluate, in windows of 512 tokens. Each row
of the table is appended to --output when it is done; started again with the same flags, the run goes on where it
stopped.
"""

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from experiments.shared import common, environment, flag_groups, records
from specjax import checkpoints, language_model, scoring
from specjax.errors import ConfigError
from specjax.files import hub
from specjax.models import llama
from specjax.models.llama import Llama
from specjax.models.prepare import prepare
from specjax.quant import rotation, view
from specjax.quantize import calibration, layerwise, quantize, recipe, rotate
from specjax.text import tokenizer

_CONFIG = ("model", "text_file", "window", "eval_tokens", "calibration_samples", "seed")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        scheme: codes that are made; None is the dense source.
        group_size: -1 is per channel.
        method: see `specjax.quantize.recipe.make`.
        rotate: QuaRot first.
        view: other activations over the same codes, or None.
    """

    scheme: str | None = None
    group_size: int = -1
    method: str = "rtn"
    rotate: bool = False
    view: str | None = None

    @property
    def id(self) -> str:
        if self.scheme is None:
            return "dense"
        group = "per-channel" if self.group_size == -1 else f"g{self.group_size}"
        parts = [self.scheme, group, self.method]
        parts += ["rotated"] if self.rotate else []
        parts += [f"as {self.view}"] if self.view else []
        return " ".join(parts)


def _rows(
    scheme: str, group_size: int, methods: str, views: str = "", rotated: str = ""
) -> list[Row]:
    rows = []
    for turned, names in ((False, methods), (True, rotated)):
        for method in names.split():
            row = Row(scheme=scheme, group_size=group_size, method=method, rotate=turned)
            more = views.split() if method != "rtn" else []
            rows += [row, *(dataclasses.replace(row, view=name) for name in more)]
    return rows


# Rows over the same codes stand together: the codes are made once.
TABLE = [
    Row(),
    *_rows("w8a16", -1, "rtn gptq"),
    *_rows("w8a8", -1, "rtn gptq smoothquant"),
    *_rows("fp8", -1, "rtn gptq"),
    *_rows("w4a16-asym", 32, "rtn gptq"),
    *_rows("w4a16-asym", 64, "rtn gptq"),
    *_rows("w4a16", 32, "rtn gptq"),
    *_rows("w4a16", 64, "rtn gptq", views="w4a8"),
    *_rows("w4a16", 128, "rtn gptq", views="w4a8"),
    *_rows("w4a16", -1, "rtn gptq", views="w4a8", rotated="rtn gptq"),
    *_rows("w4a8-qqq", -1, "rtn gptq qqq", views="w4a16", rotated="gptq"),
    *_rows("w4a8-qqq", 64, "rtn gptq qqq", views="w4a16", rotated="gptq"),
    *_rows("w4a8-qqq", 128, "rtn gptq qqq", views="w4a16", rotated="gptq"),
    *_rows("w4a8-qoq", -1, "rtn qoq", views="w4a16", rotated="qoq"),
    *_rows("w4a8-qoq", 64, "rtn qoq", views="w4a16", rotated="qoq"),
    *_rows("w4a8-qoq", 128, "rtn qoq", views="w4a16", rotated="qoq"),
    *_rows("fp4", 32, "rtn gptq", views="fp4-a8"),
    *_rows("w4a4", 64, "rtn gptq", views="w4a16", rotated="rtn gptq"),
    *_rows("w4a4", -1, "rtn gptq", views="w4a16", rotated="rtn gptq"),
]


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    with flag_groups.heading(values, "Model"):
        string("model", None, "Dense (or GGUF) checkpoint, or model name.", flag_values=values)
    with flag_groups.heading(values, "Input"):
        string("text_file", None, "Text: .txt, .json or .jsonl.", flag_values=values)
        integer("window", 512, "Tokens of a window.", lower_bound=8, flag_values=values)
        integer("eval_tokens", 20480, "Tokens to evaluate on.", lower_bound=64, flag_values=values)
    with flag_groups.heading(values, "Quantization"):
        integer(
            "calibration_samples", 64, "Windows to calibrate on.", lower_bound=1, flag_values=values
        )
        integer("seed", 0, "Of the rotation and the choice of text.", flag_values=values)
    with flag_groups.heading(values, "Measuring"):
        string(
            "rows", ".*", "Regular expression: rows to compute, by their ids.", flag_values=values
        )
    with flag_groups.heading(values, "Output"):
        string("output", None, "JSON lines, one per row of the table.", flag_values=values)
        string(
            "table",
            None,
            "Markdown file for the table, rewritten after each row.",
            flag_values=values,
        )
        flags.DEFINE_boolean("overwrite", False, "Start the output anew.", flag_values=values)
    flags.mark_flags_as_required(["model", "text_file", "output"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Computes the rows that the output lacks, in the order of the table."""
    jax.config.update("jax_default_matmul_precision", "highest")
    results = records.Records(values.output, values.overwrite)
    config = {name: values[name].value for name in _CONFIG}
    config["text_file"] = Path(values.text_file).name
    results.check_config(config, list(_CONFIG))
    done = {row["id"] for row in results.rows}
    source = _Source(values)
    wanted = [row for row in TABLE if re.search(values.rows, row.id)]
    if not wanted:
        raise ConfigError(f"--rows={values.rows!r} matches no row; ids are such as {TABLE[5].id!r}")
    with results:
        for row in wanted:
            reason = source.misfit(row)
            if row.id in done or reason:
                print(f"{row.id}: {reason or 'done already'}", flush=True)
                continue
            measured = source.measure(row)
            print(f"{row.id}: perplexity {measured['perplexity']:.4f}", flush=True)
            machine = environment.record()
            fields = dataclasses.asdict(row) | measured
            results.append({"id": row.id, **fields, "config": config, "environment": machine})
            _write_table(values.table, results.rows)
    _write_table(values.table, results.rows)
    print(table(results.rows))


class _Source:
    """The dense model, its texts, and the last codes that were made of it."""

    def __init__(self, values: flags.FlagValues):
        path = hub.resolve(values.model)
        checkpoint = checkpoints.open_checkpoint(path)
        self._text = tokenizer.load(path, checkpoint)
        if self._text is None:
            raise ConfigError(f"{path} has no tokenizer files, which --text_file needs")
        documents = calibration.read_documents(Path(values.text_file), self._text)
        window, name = values.window, values.text_file
        count = math.ceil(values.eval_tokens / window)
        self._eval = calibration.windows(documents[0::2], count, window, values.seed, name)
        samples = values.calibration_samples
        self._windows = calibration.windows(documents[1::2], samples, window, values.seed, name)
        self._seed = values.seed
        self._model = layerwise.decoded(llama.build(checkpoint, jnp.float32))
        self._last: tuple[Row, Llama, float] | None = None

    def misfit(self, row: Row) -> str | None:
        """Why the model cannot have this row, or None."""
        try:
            if row.scheme is not None:
                recipe.check_model(_recipe(row), self._model.config)
        except ConfigError as error:
            return str(error)
        return None

    def measure(self, row: Row) -> dict:
        """Perplexity and times of one row."""
        codes, seconds = self._codes(dataclasses.replace(row, view=None))
        module = codes if row.view is None else view.with_scheme(codes, row.view)
        model = language_model.LanguageModel(
            name=row.id, config=module.config, module=prepare(module), tokenizer=self._text
        )
        started = time.monotonic()
        result = scoring.perplexity(model, self._eval.reshape(-1), self._eval.shape[1])
        return {
            "perplexity": result.perplexity,
            "num_tokens": result.num_tokens,
            "num_windows": result.num_windows,
            "calibration_tokens": self._windows.size if _calibrates(row) else 0,
            "quantize_s": round(seconds, 1),
            "evaluate_s": round(time.monotonic() - started, 1),
        }

    def _codes(self, row: Row) -> tuple[Llama, float]:
        if self._last is None or self._last[0] != row:
            self._last = None  # frees the codes before others are made
            started = time.monotonic()
            model = self._model
            if row.rotate:
                online = row.scheme == "w4a4"
                made = rotation.random_hadamard(model.config, self._seed, online)
                model = rotate.rotate(model, made)
            if row.scheme is not None:
                model = quantize.quantize(model, _recipe(row), self._windows, progress=True)
            self._last = (row, model, time.monotonic() - started)
        return self._last[1:]


def _recipe(row: Row) -> recipe.Recipe:
    return recipe.make(row.scheme, row.method, group_size=row.group_size)


def _calibrates(row: Row) -> bool:
    return row.scheme is not None and _recipe(row).needs_calibration


def table(rows: list[dict]) -> str:
    """Markdown table of result rows, with the increase over the dense source."""
    dense = next((row["perplexity"] for row in rows if row["id"] == "dense"), None)
    lines = [
        "| scheme | group | method | rotated | activations viewed as | perplexity | over dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        increase = "" if dense is None else f"{100 * (row['perplexity'] / dense - 1):+.2f} %"
        group = "per channel" if row["group_size"] == -1 else str(row["group_size"])
        cells = [row["scheme"] or "dense", group, row["method"], "yes" if row["rotate"] else ""]
        cells = cells if row["scheme"] else ["dense", "", "", ""]
        cells += [row["view"] or "", f"{row['perplexity']:.4f}", increase]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _write_table(path: str | None, rows: list[dict]) -> None:
    if path is None or not rows:
        return
    config, first = rows[0]["config"], rows[0]
    text = (
        f"Perplexity of {config['model']} over {first['num_tokens']} tokens of {config['text_file']} in "
        f"{first['num_windows']} windows of {config['window']}; calibrated on "
        f"{config['calibration_samples']} other windows of it (seed {config['seed']}).\n\n"
        f"{table(rows)}\n\n    {first['environment']['command']}\n"
    )
    with records.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    common.run(define_flags, main)
