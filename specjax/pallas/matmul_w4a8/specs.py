"""Weights at which `matmul_w4a8` is compiled, tested and timed: per channel, and its other forms."""

from specjax.pallas.matmul import specs

_QOQ = dict(levels="qoq", signed=False, zeros=True, scale_dtype="int8", group_size=128)
SPECS = specs.of_models(
    {
        "g128": dict(group_size=128, scale_dtype="float16"),
        "g64": dict(group_size=64, scale_dtype="float16"),
        "zeros-g128": dict(group_size=128, signed=False, zeros=True, scale_dtype="float16"),
        "qqq-g128": dict(group_size=128, levels="qqq"),
        "qoq-g128": _QOQ,
        "qoq-per-channel": dict(signed=False, minima=True, scale_dtype="float16"),
    },
    operand_bits=8,
    group_size=-1,
    scale_dtype="float32",
)
