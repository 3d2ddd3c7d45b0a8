"""What a quantized weight is to this package, and helpers for its groups of input features."""

import dataclasses
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Shaped


@runtime_checkable
class QuantizedWeight(Protocol):
    """A quantized weight [N, K] as the op reads it, e.g. a `quant.linear.QuantizedLinear`.

    Attributes:
        codes: [N, K], stored codes.
        scales: [N, G], of the first level.
        zeros: [N, G] or None, integers.
        minima: [N, G] or None.
        channel_scales: [N] or None, of the second level.
        group_size: input features that share an entry of scales.
        levels: with the dtype of the codes, the name of a format: "single", or what the format calls itself.
    """

    codes: Array
    scales: Array
    zeros: Array | None
    minima: Array | None
    channel_scales: Array | None
    group_size: int

    @property
    def levels(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Canonical:
    """The arrays of a canonical weight (see `QuantizedWeight`), and nothing else."""

    codes: Shaped[Array, "N K"]
    scales: Shaped[Array, "N G"]
    zeros: Shaped[Array, "N G"] | None
    minima: Float[Array, "N G"] | None
    channel_scales: Float[Array, "N"] | None
    group_size: int
    levels: str


def grouped(codes: Shaped[Array, "N K"], group_size: int) -> Shaped[Array, "N G g"]:
    """The columns by group."""
    return codes.reshape(codes.shape[0], -1, group_size)
