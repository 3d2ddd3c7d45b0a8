"""How tree attention is cut into blocks on a GPU."""

from dataclasses import dataclass

from specjax.pallas.device import Gpu

# Rows that the matrix instructions of one warpgroup (four warps) take.
ROWS = 64
# Bits of a mask word; a tail is at most MAX_WORDS words wide.
WORD = 32
MAX_WORDS = 4
# Blocks of more rows than this are prompt chunks, whose split may depend on the number of rows.
_MAX_TREE = 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of one launch.

    Attributes:
        block: cache slots of one step; divides the capacity.
        stages: blocks of keys and of values in flight.
        splits: thread blocks that share the slots of one head; block i is taken by split i mod splits.
        warpgroups: groups of 64 rows that share the keys and values of a thread block.
    """

    block: int = 64
    stages: int = 4
    splits: int = 16
    warpgroups: int = 1


def row_tiles(rows: int, config: Config) -> int:
    """Thread blocks along the rows."""
    return -(-rows // (ROWS * config.warpgroups))


def heuristic(
    *, batch: int, kv_heads: int, rows: int, num_tokens: int, capacity: int, head_dim: int, gpu: Gpu
) -> Config:
    """Tiles for `rows` = nodes x query heads per kv head.

    The split of a tree is that of a single token, so that both sum in the same order.
    """
    hopper = gpu.arch[0] == 9
    warpgroups = 2 if hopper and rows > ROWS else 1
    block = 64 if hopper or gpu.shared_memory > 128 * 1024 else 32
    while capacity % block and block > 16:
        block //= 2
    stages = 4 if hopper else 2
    config = Config(block=block, stages=stages, splits=1, warpgroups=warpgroups)
    tiles = row_tiles(rows, config) if num_tokens > _MAX_TREE else 1
    splits = max(1, gpu.num_sms // (batch * kv_heads * tiles))
    splits = min(splits, max(1, capacity // block))
    return Config(block=block, stages=stages, splits=splits, warpgroups=warpgroups)
