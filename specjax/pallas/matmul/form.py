"""The run-time form of a weight: how its arrays are tiled, and what they mean."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from specjax.pallas.matmul.formats.kernel import KernelFormat

TILE = 128
# Tiles of inputs that one pipeline step of a kernel may have.
STEP_TILES = (4, 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What the arrays of a `PackedWeight` mean; static.

    Attributes:
        out_features, in_features: before padding.
        group_size: input features per entry of the canonical tables; `in_features` per channel.
        format: how codes are stored, ordered and widened.
        operand_bits: 16 (float inputs) or 8 (integer inputs); chooses the order of the columns.
        dtypes: of the canonical scales and zeros, by name ("" without zeros).
    """

    out_features: int
    in_features: int
    group_size: int
    format: KernelFormat
    operand_bits: int
    dtypes: tuple[str, str] = ("float16", "")

    @property
    def n_tiles(self) -> int:
        return -(-self.out_features // TILE)

    @property
    def k_tiles(self) -> int:
        return -(-self.in_features // TILE)

    @property
    def split_tiles(self) -> int:
        """Tiles of inputs between two places where the sum may be split."""
        return next(tiles for tiles in STEP_TILES if self.k_tiles % tiles == 0)

    @property
    def per_channel(self) -> bool:
        """One entry of the tables per output: they are applied after the whole sum."""
        return self.group_size == self.in_features and not self.format.two_level

    @property
    def table_group(self) -> int:
        """Input features per entry of the packed tables; 0 per channel."""
        return 0 if self.per_channel else min(self.group_size, TILE)

    def entries(self) -> np.ndarray:
        """The canonical group of each entry of the packed tables; -1 beyond the inputs."""
        if self.per_channel:
            return np.zeros(1, int)
        first = np.arange(0, self.k_tiles * TILE, self.table_group)
        return np.where(first < self.in_features, first // self.group_size, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight as the Mosaic kernels read it. I = N / TILE and J = K / TILE after padding.

    Attributes:
        codes: two 4-bit codes per byte (low nibble first), or int8.
        scales: one per output and `form.table_group` inputs (Q of them; one per channel).
        zeros: what group sums of the inputs are multiplied by (`KernelFormat.stored_zeros`).
        minima: as in the canonical weight.
        channel_scales: of the second level, padded.
        form: static.
    """

    codes: Shaped[Array, "I J 128 W"]
    scales: Shaped[Array, "I Q 128"]
    zeros: Int[Array, "I Q 128"] | None = None
    minima: Float[Array, "I Q 128"] | None = None
    channel_scales: Float[Array, "I 128"] | None = None
    form: Form = dataclasses.field(metadata=dict(static=True))

    @property
    def out_features(self) -> int:
        return self.form.out_features

    @property
    def in_features(self) -> int:
        return self.form.in_features

    @property
    def group_size(self) -> int:
        return self.form.group_size
