"""The quantized layouts of Hugging Face folders, and which of them a folder is.

To add one: a class with the methods of `specjax.checkpoints.base.LinearFormat` in a file of its own, listed here.
"""

from specjax.checkpoints import (
    autoround,
    awq,
    compressed_tensors,
    gptq,
    native,
    qqq,
    qserve,
    specmquant,
)
from specjax.checkpoints.base import LinearFormat
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource

FORMATS: tuple[type[LinearFormat], ...] = (
    native.SpecjaxFormat,
    specmquant.SpecMQuantFormat,
    qserve.QServeFormat,
    gptq.GPTQFormat,
    awq.AWQFormat,
    autoround.AutoRoundFormat,
    compressed_tensors.CompressedTensorsFormat,
    qqq.QQQFormat,
)
"""In order of trial: SpecMQuant's conversions keep the quantization_config of their GPTQ or QQQ source."""

_QUANTIZED_PARTS = ("qweight", "weight_packed", "B", "s1_scales", "dequant_scale")


def detect(
    quantization_config: dict | None, source: TensorSource, hf_config: dict
) -> LinearFormat | None:
    """The layout of a checkpoint's linears, found from its configuration and tensors; None if they are dense.

    Args:
        quantization_config: of config.json, or the separate quantize_config.json; None if there is neither.

    Raises:
        CheckpointError: the configuration names an unknown method or an unsupported setting, or quantized tensors come
            without a configuration.
    """
    for candidate in FORMATS:
        found = candidate.detect(quantization_config, source, hf_config)
        if found is not None:
            return found
    known = ", ".join(candidate.name for candidate in FORMATS)
    if quantization_config:
        method = quantization_config.get("quant_method", quantization_config.get("method"))
        raise CheckpointError(
            f"quantization_config.quant_method={method!r} is not supported; supported: {known}"
        )
    for name in source.names():
        if name.rpartition(".")[2] in _QUANTIZED_PARTS:
            raise CheckpointError(
                f"{name}: is quantized, but neither config.json (quantization_config) nor quantize_config.json says "
                f"how; known formats: {known}"
            )
    return None
