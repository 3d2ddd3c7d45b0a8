"""Weights at which `matmul_w8a8` is compiled, tested and timed: per channel, and in groups."""

from specjax.pallas.matmul import specs

SPECS = specs.of_models(
    {"g128": dict(group_size=128)},
    code_bits=8,
    operand_bits=8,
    group_size=-1,
    scale_dtype="float32",
)
