"""What one launch of a matmul kernel fixes before it is traced, for both skeletons."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import errors
from specjax.pallas.matmul.form import TILE, Form
from specjax.pallas.matmul.formats.kernel import KernelFormat
from specjax.pallas.matmul.operand import Operand


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of a matmul kernel.

    Attributes:
        tiles_per_step: tiles of `TILE` inputs per pipeline step.
        num_stages: pipeline steps in flight.
        splits: parts into which the inputs are cut, each summed by its own block. It may depend on
            the weight and the device but never on the number of rows, so that a token is rounded
            alike alone and in a tree.
    """

    tiles_per_step: int
    num_stages: int
    splits: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise errors.ConfigError(f"{field.name}={getattr(self, field.name)}: not positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A launch.

    Attributes:
        form: of the packed weight.
        operand: where widened codes go.
        config: tiles.
        rows: of the padded inputs, a multiple of m_tile.
        m_tile: rows per block.
        has_zeros, has_minima: the tables that are applied inside the kernel exist.
        out_dtype: of the partial sums.
    """

    form: Form
    operand: Operand
    config: Config
    rows: int
    m_tile: int
    has_zeros: bool
    has_minima: bool
    out_dtype: np.dtype

    def __post_init__(self):
        tiles, form = self.config.tiles_per_step, self.form
        if form.split_tiles % tiles or self.config.splits > form.k_tiles // form.split_tiles:
            raise errors.ConfigError(
                f"{self.config} does not fit a weight of {form.in_features} inputs: tiles_per_step "
                f"must divide {form.split_tiles}, and splits may not exceed "
                f"{form.k_tiles // form.split_tiles}"
            )

    @property
    def format(self) -> KernelFormat:
        """Of the codes."""
        return self.form.format

    @property
    def group(self) -> int:
        """Inputs per accumulator that is scaled on its own; 0: one accumulator for the whole sum."""
        return 0 if self.format.scales_in_registers else self.form.table_group

    @property
    def acc_dtype(self):
        """Of what the matrix instruction sums."""
        return jnp.float32 if self.operand.bits == 16 else jnp.int32

    @property
    def sum_dtype(self):
        """Of the sum over groups: integer where their scales are."""
        whole = self.format.integer_groups or not self.group
        return self.acc_dtype if whole else jnp.float32

    @property
    def factor(self) -> int:
        """By which accumulators exceed sums of codes times inputs."""
        return self.format.factor(self.operand)

    @property
    def shifts_late(self) -> bool:
        """Sums of integer groups are divided by `factor` once, at the end: their split fits int32 before."""
        integers = bool(self.group) and self.sum_dtype == jnp.int32
        return integers and self.factor * 2**14 * self._inputs_per_split < 2**31

    @property
    def _inputs_per_split(self) -> int:
        """Of the largest split."""
        places = self.form.k_tiles // self.form.split_tiles
        return -(-places // self.config.splits) * self.form.split_tiles * TILE

    @property
    def uses_sums(self) -> bool:
        """Group sums of the inputs go into the kernel."""
        return bool(self.group) and (self.has_zeros or self.has_minima or not self.format.signed)

    @property
    def unit(self) -> int:
        """Inputs that are widened and multiplied at once."""
        return self.group or TILE

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that are read along with the codes, one entry per unit."""
        names = ["scales"] if self.group or self.format.scales_in_registers else []
        if self.group:
            names += ["zeros"] * self.has_zeros + ["minima"] * self.has_minima
        return tuple(names)

    @property
    def units_per_step(self) -> int:
        return self.config.tiles_per_step * TILE // self.unit

    @property
    def steps_between_splits(self) -> int:
        """Pipeline steps between two places where the sum may be split."""
        return self.form.split_tiles // self.config.tiles_per_step

    def steps(self, split):
        """The first pipeline step of a split and how many it has; static where all have as many."""
        unit, splits = self.steps_between_splits, self.config.splits
        places = self.form.k_tiles // self.form.split_tiles
        if places % splits == 0:
            count = places // splits * unit
            return split * count, count
        first = lax.div(split * places, splits)
        return first * unit, (lax.div((split + 1) * places, splits) - first) * unit
