"""Tiles of the matmul kernels: a tuned table where there is one, else a heuristic."""

from specjax.pallas import device, tuned
from specjax.pallas.device import Gpu
from specjax.pallas.matmul.form import STEP_TILES, TILE, Form
from specjax.pallas.matmul.plan import Config
from specjax.pallas.matmul.ring import sums_columns

# Multiprocessors of a typical device, by compute capability.
_NUM_SMS = {(9, 0): 132, (8, 0): 108, (8, 6): 82, (8, 7): 16, (8, 9): 128}
_NUM_SMS |= {(10, 0): 148, (10, 3): 160, (12, 0): 170, (12, 1): 48}
_MAX_SPLITS = 16
_MIN_STAGES, _MAX_STAGES = 3, 6
# What a block costs besides its tiles (launch, first loads, store), in tiles; and a part more to add.
_BLOCK_OVERHEAD, _SPLIT_OVERHEAD = 6, 0.5
# Columns of accumulators in one unrolled step; more of them spill registers.
_MAX_ACCUMULATORS = 256
# Barriers and alignment.
_RESERVED_BYTES = 2048


def lookup(
    op: str, form: Form, m_tile: int, operand_bits: int, gpu: Gpu, measured: str | None = None
) -> Config:
    """Tiles for a weight under `m_tile` rows per block; `measured` is a table that goes before this package's."""
    key = tuned.weight_key(form.out_features, form.in_features, form.table_group)
    own = {} if measured is None else tuned.parsed(measured)
    entry = own.get(key, tuned.table(op, gpu.kind).get(key))
    if entry is None:
        return heuristic(form, m_tile, operand_bits, gpu)
    if str(m_tile) in entry["rows"]:
        return Config(splits=entry["splits"], **entry["rows"][str(m_tile)])
    return heuristic(form, m_tile, operand_bits, gpu, splits=entry["splits"])


def typical(arch: tuple[int, int]) -> Gpu:
    """A GPU of a compute capability, where none is at hand or named."""
    return Gpu(
        kind=f"sm_{arch[0]}{arch[1]}",
        arch=arch,
        num_sms=_NUM_SMS[arch],
        shared_memory=device.SHARED_MEMORY[arch],
    )


def heuristic(
    form: Form, m_tile: int, operand_bits: int, gpu: Gpu, splits: int | None = None
) -> Config:
    """Tiles where none were measured: blocks that fill the device in few waves, stages that fit."""
    splits = _splits(form, gpu.num_sms) if splits is None else splits
    widest = form.split_tiles
    for tiles in (t for t in STEP_TILES if t <= widest):
        stages = _stages(form, m_tile, operand_bits, tiles, gpu)
        accumulators = tiles * TILE // (form.table_group or TILE) * m_tile
        if stages >= _MIN_STAGES and accumulators <= _MAX_ACCUMULATORS:
            break
    steps = -(-form.k_tiles // (tiles * splits))
    return Config(tiles_per_step=tiles, num_stages=max(1, min(stages, steps)), splits=splits)


def _splits(form: Form, num_sms: int) -> int:
    """Parts of the inputs; from the weight alone."""
    steps = form.k_tiles // form.split_tiles

    def cost(splits: int) -> float:
        waves = -(-form.n_tiles * splits // num_sms)
        tiles = -(-steps // splits) * form.split_tiles
        return waves * (tiles + _BLOCK_OVERHEAD) + _SPLIT_OVERHEAD * splits

    return min(range(1, min(_MAX_SPLITS, steps) + 1), key=cost)


def stage_bytes(form: Form, m_tile: int, operand_bits: int, tiles: int, gpu: Gpu) -> int:
    """Shared memory of one pipeline stage, at most."""
    columns, hopper = tiles * TILE, gpu.arch[0] == 9
    outputs = TILE if hopper else TILE // 2
    num_bytes = outputs * columns * form.format.bits // 8 + m_tile * columns * operand_bits // 8
    if hopper and (form.table_group or form.format.two_level):
        # Scales, zeros and minima, and group sums of the inputs, at their widest.
        entries = columns // (form.table_group or TILE)
        tables = 4 + (0 if form.format.signed else 6)
        sums = 0 if form.format.signed else 4 * sums_columns(m_tile)
        num_bytes += entries * (TILE * tables + sums)
    return num_bytes


def _stages(form: Form, m_tile: int, operand_bits: int, tiles: int, gpu: Gpu) -> int:
    """Pipeline stages that fit in shared memory."""
    per_stage = stage_bytes(form, m_tile, operand_bits, tiles, gpu)
    available = gpu.shared_memory - _RESERVED_BYTES
    if gpu.arch[0] == 9:
        return min(_MAX_STAGES, (available - TILE * m_tile * 4) // per_stage)
    fitting = available // per_stage
    return min(
        _MAX_STAGES, fitting, max(fitting // 2, 2)
    )  # two blocks per multiprocessor if they can
