"""Linears that a file stores fused with their neighbours: q, k, v in one and gate, up in one."""

import dataclasses

from specjax.checkpoints import tensors
from specjax.errors import CheckpointError
from specjax.files.base import TensorSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the outputs of a linear lie in a file that may have fused it with its neighbours.

    Attributes:
        prefix: of the stored, possibly fused, linear.
        start: first output of ours in it.
        count: outputs of ours.
        total: outputs stored.
    """

    prefix: str
    start: int
    count: int
    total: int

    def tiles(self, size: int) -> tuple[slice, slice]:
        """The whole tiles of `size` outputs that cover ours, and ours within them."""
        first = self.start // size * size
        last = -(-(self.start + self.count) // size) * size
        return slice(first, last), slice(self.start - first, self.start - first + self.count)


_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", -2),
    "v_proj": ("qkv_proj", -1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", -1),
}


def locate(source: TensorSource, prefix: str, part: str, out_features: int) -> Rows:
    """Finds a linear under its own name, or as rows of `qkv_proj` or `gate_up_proj` (q, k, v or gate, up stacked).

    Args:
        part: a tensor of the linear whose last axis counts outputs; it tells the fused size.

    Raises:
        CheckpointError: neither is there, or the fused one has another size than its parts.
    """
    name = f"{prefix}.{part}"
    if tensors.has(source, name):
        return Rows(prefix=prefix, start=0, count=out_features, total=out_features)
    parent, _, leaf = prefix.rpartition(".")
    if leaf not in _FUSED:
        raise CheckpointError(f"{name}: missing from the checkpoint")
    fused_leaf, position = _FUSED[leaf]
    fused = f"{parent}.{fused_leaf}"
    if not tensors.has(source, f"{fused}.{part}"):
        raise CheckpointError(f"{name}: missing from the checkpoint, and so is {fused}.{part}")
    total = source.shape(f"{fused}.{part}")[-1]
    start = total + position * out_features if position else 0
    paired = fused_leaf != "gate_up_proj" or total == 2 * out_features
    if start < 0 or start + out_features > total or not paired:
        raise CheckpointError(
            f"{fused}.{part}: has {total} outputs, too few or too many for {leaf} with {out_features}"
        )
    return Rows(prefix=fused, start=start, count=out_features, total=total)
