"""Weights at which `matmul_w8a16` is compiled, tested and timed: per channel, and its other forms."""

from specjax.pallas.matmul import specs

SPECS = specs.of_models(
    {"g128": dict(group_size=128), "zeros": dict(group_size=128, signed=False, zeros=True)},
    code_bits=8,
    group_size=-1,
)
