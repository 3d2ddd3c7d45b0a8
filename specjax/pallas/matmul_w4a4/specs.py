"""Weights at which `matmul_w4a4` is compiled, tested and timed: QSpec's groups of 128, and per channel."""

from specjax.pallas.matmul import specs

SPECS = specs.of_models(
    {"per-channel": dict(group_size=-1), "qqq-g128": dict(levels="qqq")},
    operand_bits=8,
    input_bits=4,
)
