"""Quantizes models and changes their format; checks the result by reading it back.

    python -m experiments.convert --source=DIR --output=OUT --format=gptq --scheme=w4a16
    --group_size=64 \
        --method=gptq --calibration_file=text.jsonl
    python -m experiments.convert --source=DIR --output=OUT --format=compressed-tensors
    python -m experiments.convert --source=PLAIN_TARGET --head=HEAD
    --rotation=ROTATED/rotation.safetensors --output=OUT

The second line keeps the codes of a quantized source. The third converts an EAGLE head for a
rotated target. Runs that were interrupted while calibrating resume when started again with the same
flags.
"""

from absl import flags

from experiments.shared import common
from specjax import conversion
from specjax.checkpoints import export
from specjax.config import DTYPES
from specjax.quant.scheme import SCHEMES
from specjax.quantize import recipe

_MODEL_FLAGS = (
    *("format", "scheme", "method", "group_size", "symmetric", "act_order", "damping", "clip"),
    *("smooth_strength", "rotate", "rotation", "calibration_file", "calibration_samples"),
    *("calibration_tokens", "seed", "dtype", "layout", "overwrite"),
)


def define_flags(values: flags.FlagValues) -> None:
    """Flags of this binary."""

    def define(kind, name, default, text, **bounds):
        kind(name, default, text, flag_values=values, **bounds)

    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    boolean, number = flags.DEFINE_boolean, flags.DEFINE_float
    define(string, "source", None, "Checkpoint folder, .gguf file, model name or hub id.")
    define(string, "output", None, "Folder to make.")
    define(string, "format", "specjax", f"One of {', '.join(export.FORMATS)}.")
    define(string, "scheme", None, f"Quantize to one of {', '.join(SCHEMES)}.")
    define(
        *(string, "method", None),
        f"One of {', '.join(recipe.METHODS)}. Default: gptq with --calibration_file, else rtn.",
    )
    define(
        *(integer, "group_size", None),
        "Input features that share a scale; -1 is per channel. Default: 128 for w4a16, fp4 and QoQ, else -1.",
    )
    define(boolean, "symmetric", True, "Signed codes without zeros (w4a16).")
    define(boolean, "act_order", True, "GPTQ: visit features by falling Hessian diagonal.")
    define(number, "damping", 0.01, "GPTQ: share of the mean Hessian diagonal added to it.")
    define(boolean, "clip", None, "Search ranges by |error|^2.4. Default: for 4-bit weights.")
    define(
        *(number, "smooth_strength", None),
        "Migration strength of smoothquant (default: searched) and qoq.",
    )
    define(boolean, "rotate", False, "Rotate first (QuaRot); with run-time products for w4a4.")
    define(string, "rotation", None, "Rotation file to use; with --head, of the rotated target.")
    define(
        *(string, "head", None),
        "EAGLE head to convert for a rotated target (--rotation); EAGLE-3 to speculators layout.",
    )
    define(
        string, "calibration_file", None, "Text for gptq, smoothquant and qoq: txt, json, jsonl."
    )
    define(integer, "calibration_samples", 64, "Calibration windows.", lower_bound=1)
    define(integer, "calibration_tokens", 512, "Tokens of a window.", lower_bound=8)
    define(integer, "seed", 0, "Seed of the rotation and of the choice of text.")
    define(
        *(string, "dtype", None),
        f"Of embeddings, norms and dense linears ({', '.join(DTYPES)}). Default: the source's.",
    )
    define(string, "layout", "safetensors", "safetensors, or orbax for --format=specjax.")
    define(boolean, "overwrite", False, "Replace an existing output.")
    flags.mark_flags_as_required(["source", "output"], flag_values=values)


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
