"""Text that a target writes itself, for training draft heads: user turns it makes up, and its answers.

Both go row by row into files of a work folder, so that an interrupted run continues.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

import specjax
from experiments.shared import prompt_files, records

_MAX_PROMPT_TOKENS = 128


def prompts(values: flags.FlagValues, model: specjax.LanguageModel, work: Path) -> Path:
    """User turns that the target samples where the chat template expects the user to speak."""
    mark = "\N{SNOWMAN}"
    asked = model.tokenizer.render_chat([{"role": "user", "content": mark}])
    before = model.tokenizer.encode(asked.split(mark)[0], False)
    path = work / "prompts.jsonl"
    options = {"max_new_tokens": _MAX_PROMPT_TOKENS, "temperature": 1.0, "top_p": 0.95}
    rows = [{"id": i, "input_ids": before} for i in range(values.self_prompts)]
    to_row = lambda answer: {"prompt": answer.text.strip()}
    _generated(values, model, rows, path, "prompts", to_row, options)
    # Repeated, cut off and empty turns make poor prompts.
    seen, kept = set(), []
    for row in sorted(records.Records(path, False).rows, key=lambda row: row["id"]):
        if row["finished"] and row["prompt"] and row["prompt"] not in seen:
            seen.add(row["prompt"])
            kept.append({"id": row["id"], "prompt": row["prompt"]})
    chosen = work / "chosen_prompts.jsonl"
    with records.atomic(chosen) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return chosen


def answers(
    values: flags.FlagValues, model: specjax.LanguageModel, asked: Path, work: Path
) -> Path:
    """The target's answers to the prompts."""
    rows = [row["row"] | {"id": row["id"]} for row in prompt_files.read_prompts(asked)]
    path = work / "answers.jsonl"
    options = {"max_new_tokens": values.max_new_tokens, "temperature": values.temperature}
    to_row = lambda answer: {
        "tokens": [*answer.input_ids, *answer.output_ids],
        "response": len(answer.input_ids),
        "text": answer.text,  # what `experiments.overlap` reads
    }
    _generated(values, model, rows, path, "answers", to_row, options)
    return path


def _generated(
    values: flags.FlagValues,
    model: specjax.LanguageModel,
    rows: Sequence[dict[str, Any]],
    path: Path,
    name: str,
    to_row: Callable[[specjax.GenerationResult], dict[str, Any]],
    options: dict[str, Any],
) -> None:
    """Runs the rows in batches and appends what `to_row` makes of each to a file as they come; resumes."""
    config = {"model": values.model, "seed": values.seed, **options}
    results = records.Records(path, False)
    results.check_config(config, list(config))
    done = {row["id"] for row in results.rows}
    missing = [(number, row) for number, row in enumerate(rows) if row["id"] not in done]
    # Several batches at a time, so that finished slots are refilled.
    size = 8 * values.batch_size
    with results, tqdm(total=len(rows), initial=len(done), unit="row", desc=name) as bar:
        for begin in range(0, len(missing), size):
            group = missing[begin : begin + size]
            numbers, asked = zip(*group, strict=True)
            batch = {"batch_size": values.batch_size, "seed": values.seed}
            for index, answer in model.generate_iter(
                asked, request_ids=numbers, **batch, **options
            ):
                row = {"id": asked[index]["id"], "finished": answer.finish_reason == "stop"}
                results.append(row | to_row(answer) | {"config": config})
                bar.update()
