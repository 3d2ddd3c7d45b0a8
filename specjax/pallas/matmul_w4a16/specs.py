"""Weights at which `matmul_w4a16` is compiled, tested and timed: groups of 128, and its other forms."""

from specjax.pallas.matmul import specs

SPECS = specs.of_models(
    {
        "per-channel": dict(group_size=-1),
        "g64": dict(group_size=64),
        "g32": dict(group_size=32),
        "zeros": dict(signed=False, zeros=True),
        "minima-g32": dict(signed=False, minima=True, group_size=32),
    }
)
