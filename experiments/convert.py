"""Quantizes models and changes their format; checks the result by reading it back.

    python -m experiments.convert --source=DIR --output=OUT --format=gptq --scheme=w4a16 --group_size=64 \\
        --method=gptq --calibration_file=text.jsonl
    python -m experiments.convert --source=DIR --output=OUT --format=compressed-tensors
    python -m experiments.convert --source=PLAIN_TARGET --head=HEAD --rotation=ROTATED/rotation.safetensors --output=OUT

The second line keeps the codes of a quantized source. The third converts an EAGLE head for a rotated target. Runs that
were interrupted while calibrating resume when started again with the same flags.
"""

import functools

from absl import flags

from experiments.shared import common, flag_groups
from specjax import conversion
from specjax.checkpoints import export
from specjax.config import DTYPES
from specjax.quant.scheme import SCHEMES
from specjax.quantize import recipe

_MODEL_FLAGS = (
    *(
        "format",
        "scheme",
        "method",
        "head_scheme",
        "group_size",
        "symmetric",
        "act_order",
        "damping",
        "clip",
    ),
    *("smooth_strength", "rotate", "rotation", "calibration_file", "calibration_samples"),
    *("calibration_tokens", "seed", "dtype", "layout", "overwrite"),
)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    boolean = functools.partial(flags.DEFINE_boolean, flag_values=values)
    with flag_groups.heading(values, "Input"):
        string("source", None, "Checkpoint folder, .gguf file, model name or hub id.")
        string(
            "head",
            None,
            "EAGLE head to convert for a rotated target (--rotation); EAGLE-3 to speculators layout.",
        )
    with flag_groups.heading(values, "Output"):
        string("output", None, "Folder to make.")
        string("format", "specjax", f"One of {', '.join(export.FORMATS)}.")
        string("layout", "safetensors", "safetensors, or orbax for --format=specjax.")
        string(
            "dtype",
            None,
            f"Of embeddings, norms and dense linears ({', '.join(DTYPES)}). Default: the source's.",
        )
        boolean("overwrite", False, "Replace an existing output.")
    _define_quantization_flags(values)
    flags.mark_flags_as_required(["source", "output"], flag_values=values)


def _define_quantization_flags(values: flags.FlagValues) -> None:
    """To which scheme, by which method, on which text."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    integer = functools.partial(flags.DEFINE_integer, flag_values=values)
    boolean = functools.partial(flags.DEFINE_boolean, flag_values=values)
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    with flag_groups.heading(values, "Quantization"):
        string("scheme", None, f"Quantize to one of {', '.join(SCHEMES)}.")
        string("head_scheme", recipe.DENSE_HEAD, "Of the output head: dense, or an 8-bit scheme.")
        integer(
            "group_size",
            None,
            "Input features that share a scale; -1 is per channel. Default: 128 for w4a16, fp4 and QoQ, else -1.",
        )
        string(
            "method",
            None,
            f"One of {', '.join(recipe.METHODS)}. Default: gptq with --calibration_file, else rtn.",
        )
        string("calibration_file", None, "Text for gptq, smoothquant and qoq: txt, json, jsonl.")
        integer("calibration_samples", 64, "Calibration windows.", lower_bound=1)
        integer("calibration_tokens", 512, "Tokens of a window.", lower_bound=8)
        boolean("symmetric", True, "Signed codes without zeros (w4a16).")
        boolean("act_order", True, "GPTQ: visit features by falling Hessian diagonal.")
        number("damping", 0.01, "GPTQ: share of the mean Hessian diagonal added to it.")
        boolean("clip", None, "Search ranges by |error|^2.4. Default: for 4-bit weights.")
        number(
            "smooth_strength",
            None,
            "Migration strength of smoothquant (default: searched) and qoq.",
        )
        boolean("rotate", False, "Rotate first (QuaRot); with run-time products for w4a4.")
        string("rotation", None, "Rotation file to use; with --head, of the rotated target.")
        integer("seed", 0, "Seed of the rotation and of the choice of text.")


def main(values: flags.FlagValues) -> None:
    """Converts a model, or a head if one is given."""
    if values.head is not None:
        output = conversion.convert_head(
            *(values.head, values.source, values.rotation, values.output),
            overwrite=values.overwrite,
        )
        print(f"draft head -> {output}")
        return
    options = {name: values[name].value for name in _MODEL_FLAGS}
    result = conversion.convert(values.source, values.output, progress=True, **options)
    rotated = "" if result.rotation is None else f", rotation {result.rotation}"
    print(
        f"{result.scheme or 'dense'} as {result.format}{rotated}: {result.num_bytes / 1e6:.1f} MB in "
        f"{result.seconds:.1f} s -> {result.output}"
    )
    print(f"reloaded: relative RMS error of the logits {result.reload_error:.2e}")
    print(
        f"against the source: relative RMS error {result.source_error:.4f}, "
        f"same most likely token at {100 * result.agreement:.1f} % of positions ({result.probe})"
    )


if __name__ == "__main__":
    common.run(define_flags, main)
