"""Generates text with any combination of model, drafter and scheme.

    python -m experiments.generate --model=smollm2-135m --drafter=ngram --prompt="Why is the sky blue?"
    python -m experiments.generate --model=DIR --drafter=lm --draft_checkpoint=DIR \\
        --prompts_file=prompts.jsonl --output=out.jsonl --max_new_tokens=256 --batch_size=4

A row of --prompts_file has `id` (default: its number from 0) and, in this order of precedence, `input_ids`,
`messages`, `text` (raw) or `prompt` (user turn; the chat template is applied); other fields are ignored.

A row of --output has `id`, `input_ids`, `output_ids` (the stop token included), `text`, `finish_reason`, the metrics of
`specjax.Metrics`, and `config`. Rows are written as they finish (with --batch_size > 1 not in the order of the
prompts). Run the same command again to continue after an interruption: rows that are there are kept, and as every row
has its own random stream, the others come out as they would have. A file made with another configuration is refused.

--prompt streams the text, and writes a row with id 0 where --output is given.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from tqdm import tqdm

import specjax
from experiments.shared import (
    common,
    environment,
    flag_groups,
    flags_drafter,
    flags_model,
    flags_sampling,
    naming,
    prompt_files,
    records,
)
from specjax.errors import ConfigError
from specjax.language_model import Options

_FINGERPRINT = (
    *("model", "drafter", "dtype", "scheme", "qserve_layernorm", "depth", "seed"),
    "max_new_tokens",
    *("max_length", "temperature", "top_k", "top_p", "stop", "acceptance", "ignore_eos"),
    *("stop_token_ids", "add_generation_prompt", "continue_final_message"),
)
# Flags that say how conversations end.
_CHAT = ("add_generation_prompt", "continue_final_message")


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_sampling.define(values)
    flags_model.define(values)
    flags_drafter.define(values)
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string(
            "prompt", None, "A user turn, answered as a stream.", flag_values=values
        )
        flags.DEFINE_string("prompts_file", None, "JSON lines of prompts.", flag_values=values)
        flags.DEFINE_boolean(
            "raw", False, "--prompt is raw text to continue; no chat template.", flag_values=values
        )
        flags.DEFINE_boolean(
            "add_generation_prompt",
            None,
            "Messages end where the assistant begins to speak. Default: unless the last one is continued.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "continue_final_message",
            None,
            "Messages end with the text of the last one, which is continued.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "JSON lines of results.", flag_values=values)
        flags.DEFINE_boolean(
            "overwrite", False, "Start --output anew instead of continuing it.", flag_values=values
        )


def main(values: flags.FlagValues) -> None:
    """Checks everything that can be checked without the model, loads it, generates."""
    Options(
        **flags_sampling.options(values), **_chat_options(values)
    )  # raises where a value is wrong
    prompts = _prompts(values)
    spec = flags_drafter.spec(values)
    config = _config(values, spec)
    output = None
    if values.output is not None:
        output = records.Records(values.output, values.overwrite)
        # An unset --dtype is known only when the model is loaded.
        unknown = {"dtype"} if values.dtype is None else set()
        output.check_config(config, [name for name in _FINGERPRINT if name not in unknown])
    model = flags_model.load_model(values, [spec])
    config["dtype"] = model.dtype_name
    config["fingerprint"] = records.fingerprint(config, _FINGERPRINT)
    source = values.prompts_file or "--prompt"
    encoded = prompt_files.encode(
        model, prompts, source, values.max_length, **_chat_options(values)
    )
    todo = list(range(len(prompts)))
    if output is not None:
        output.check_config(config, _FINGERPRINT)
        todo = _remaining(output, prompts, encoded)
    drafter = model.drafter(spec)
    with flags_model.profiled(values), output or contextlib.nullcontext() as sink:
        if not todo:
            sink.repair()
            print(f"all {len(prompts)} rows are in {sink.path}; nothing to do")
        elif values.prompt is not None:
            _interactive(model, drafter, encoded[0], values, config, sink)
        else:
            _batch(model, drafter, prompts, encoded, todo, values, config, sink)


def _prompts(values: flags.FlagValues) -> list[dict[str, Any]]:
    """Rows of the prompts file, or one row made of --prompt; see `prompt_files.read_prompts`."""
    if (values.prompt is None) == (values.prompts_file is None):
        raise ConfigError("give either --prompt=TEXT or --prompts_file=FILE")
    if values.prompt is not None:
        row = {"text" if values.raw else "prompt": values.prompt}
        return [{"id": 0, "line": None, "row": row}]
    if values.output is None:
        raise ConfigError("--prompts_file needs --output=FILE")
    return prompt_files.read_prompts(values.prompts_file)


def _config(values: flags.FlagValues, spec: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides how rows come about; `_FINGERPRINT` names what decides their tokens."""
    generation = flags_sampling.options(values)
    return {
        **flags_model.model_config(values),
        "drafter": naming.full_spec(spec),
        **{name: value for name, value in generation.items() if name != "batch_size"},
        **{name: values[name].value for name in _CHAT},
        "backend": values.backend,
        "dequantize": flags_model.dequantize(values, [spec]),
        "environment": environment.record(),
    }


def _chat_options(values: flags.FlagValues) -> dict[str, bool]:
    """The flags of conversations that are given."""
    return {name: values[name].value for name in _CHAT if values[name].value is not None}


def _remaining(output: records.Records, prompts, encoded) -> list[int]:
    """Numbers of the prompts that have no result yet; refuses results of other prompts under the same id."""
    done = {row["id"]: row.get("input_ids") for row in output.rows}
    for prompt, ids in zip(prompts, encoded, strict=True):
        if prompt["id"] in done and done[prompt["id"]] != ids:
            raise ConfigError(
                f"{output.path}: row {prompt['id']!r} was made from another prompt; pass --overwrite to start "
                "anew, or another --output"
            )
    return [index for index, prompt in enumerate(prompts) if prompt["id"] not in done]


def _batch(model, drafter, prompts, encoded, todo, values, config, sink) -> None:
    """Generates for the prompts numbered `todo`, writing rows as they finish, with a progress bar."""
    results = model.generate_iter(
        [encoded[index] for index in todo],
        drafter,
        ids=[prompts[index]["id"] for index in todo],
        request_ids=todo,
        **flags_sampling.options(values),
    )
    begin = time.perf_counter()
    tokens = steps = accepted = 0
    bar = tqdm(total=len(prompts), initial=len(prompts) - len(todo), unit="row", disable=None)
    with bar:
        for result in _interruptible(results, sink):
            sink.append(result.to_dict() | {"config": config})
            tokens += result.metrics.new_tokens
            steps += result.metrics.num_spec_steps
            accepted += result.metrics.num_accepted_draft_tokens
            bar.set_postfix(acceptance=f"{1 + accepted / max(steps, 1):.2f}", refresh=False)
            bar.update()
    elapsed = time.perf_counter() - begin
    print(
        f"{len(todo)} rows, {tokens} tokens in {elapsed:.1f} s with compilation, mean acceptance length "
        f"{1 + accepted / max(steps, 1):.2f} -> {sink.path}"
    )


def _interruptible(results, sink) -> Iterator[specjax.GenerationResult]:
    """The results; an interruption is told where to go on."""
    try:
        for _, result in results:
            yield result
    except KeyboardInterrupt:
        print(f"\nfinished rows are in {sink.path}; the same command continues", file=sys.stderr)
        raise


def _interactive(model, drafter, prompt: list[int], values, config, sink) -> None:
    """Streams one answer to stdout and sums it up."""
    result = None
    for event in model.stream(
        prompt, drafter, **flags_sampling.options(values) | {"batch_size": 1}
    ):
        print(event.text, end="", flush=True)
        result = event.result
    print("\n" + summary(result))
    if sink is not None:
        sink.append(result.to_dict() | {"config": config})


def summary(result: specjax.GenerationResult) -> str:
    """One line about a finished generation."""
    metrics = result.metrics
    parts = [f"{metrics.new_tokens} tokens"] + ([] if metrics.lossless else ["lossy"])
    if metrics.tokens_per_s is not None:
        parts.append(f"{metrics.tokens_per_s:.1f} tokens/s")
    if metrics.num_draft_tokens:
        parts.append(f"acceptance length {metrics.mean_acceptance_length:.2f}")
    if metrics.executed_fraction is not None:
        parts.append(f"{metrics.executed_fraction:.0%} of the layers ran")
    parts += [
        f"{metrics.num_spec_steps} steps",
        f"prefill {metrics.prefill_ms:.0f} ms",
        f"decode {metrics.decode_ms:.0f} ms",
        f"compile {metrics.compile_ms:.0f} ms",
        f"ended by {result.finish_reason}",
    ]
    return f"[{', '.join(parts)}]"


if __name__ == "__main__":
    common.run(define_flags, main)
