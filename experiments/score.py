"""Scores given texts with a model.

    python -m experiments.score --model=DIR --input_ids_file=ids.safetensors --output=logits.safetensors
    python -m experiments.score --model=DIR --text_file=text.txt --output=perplexity.json

The first writes the tensor `logits` (float32 [B, T, V]) for the tensor `input_ids` [B, T]. The second cuts the text
into windows of 512 tokens without overlap, puts BOS before each where the model has one, and writes the perplexity
with the number of tokens scored and of windows. Files appear complete or not at all.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from absl import flags

from experiments.shared import common, environment, flag_groups, flags_model, records
from specjax import scoring
from specjax.errors import CheckpointError, ConfigError


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    flags_model.define(values)
    with flag_groups.heading(values, "Input"):
        flags.DEFINE_string("text_file", None, "UTF-8 text.", flag_values=values)
        flags.DEFINE_integer(
            "window", 512, "Text tokens per window.", lower_bound=2, flag_values=values
        )
        flags.DEFINE_string(
            "input_ids_file",
            None,
            "Safetensors file with the tensor input_ids.",
            flag_values=values,
        )
    with flag_groups.heading(values, "Output"):
        flags.DEFINE_string("output", None, "Where the result goes.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Reads the input, loads the model, scores, writes."""
    if (values.input_ids_file is None) == (values.text_file is None):
        raise ConfigError("give either --input_ids_file=FILE or --text_file=FILE")
    if values.input_ids_file is not None:
        _write_logits(values)
    else:
        _write_perplexity(values)


def _write_logits(values: flags.FlagValues) -> None:
    output = records.check_output(values.output, ".safetensors")
    input_ids = read_input_ids(values.input_ids_file)
    model = flags_model.load_model(values)
    with flags_model.profiled(values):
        logits = scoring.logits(model, input_ids)
    with records.atomic(output) as path:
        metadata = {"config": json.dumps(_config(values, model))}
        safetensors.numpy.save_file({"logits": logits}, path, metadata)
    print(f"logits {list(logits.shape)} -> {output}")


def _write_perplexity(values: flags.FlagValues) -> None:
    output = records.check_output(values.output, ".json")
    try:
        text = Path(values.text_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{values.text_file}: not UTF-8 text: {error}") from None
    model = flags_model.load_model(values)
    if model.tokenizer is None:
        raise ConfigError(f"model {model.name!r} has no tokenizer files, which --text_file needs")
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    with flags_model.profiled(values):
        result = scoring.perplexity(model, ids, values.window)
    row = dataclasses.asdict(result)
    row |= {"text_file": Path(values.text_file).name, "config": _config(values, model)}
    with records.atomic(output) as path:
        path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    print(
        f"perplexity {result.perplexity:.4f} over {result.num_tokens} tokens in {result.num_windows} "
        f"windows -> {output}"
    )


def _config(values: flags.FlagValues, model) -> dict:
    return {
        **flags_model.model_config(values),
        "dtype": model.dtype_name,
        "backend": values.backend,
        "dequantize": values.dequantize,
        "environment": environment.record(),
    }


def read_input_ids(path: str) -> np.ndarray:
    """The tensor `input_ids` of a safetensors file, [B, T], of an integer type.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or the tensor is missing or of another kind.
    """
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None
    if "input_ids" not in tensors:
        raise CheckpointError(f"{path}: no tensor input_ids; it has: {', '.join(sorted(tensors))}")
    ids = tensors["input_ids"]
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise CheckpointError(
            f"{path}: input_ids is {ids.dtype} {list(ids.shape)}; integers of shape [B, T] are needed"
        )
    return ids


if __name__ == "__main__":
    common.run(define_flags, main)
