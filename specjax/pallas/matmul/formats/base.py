"""What every weight format states: the meaning of its codes on the host, names, and specs.

With group g(k) of input feature k, and c what a code stands for (`Format.values`), a format of one
level reads

| parts | runtime weight | weight in floats |
|---|---|---|
| scales, zeros | c - zeros[g] | (c - zeros[g]) * scales[g] |
| scales, minima | c | c * scales[g] + minima[g] |

A format of two levels (`two_level`) makes int8 weights of the codes, under `channel_scales`.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from specjax.pallas.matmul.operand import dtype_bits
from specjax.pallas.matmul.weight import QuantizedWeight, grouped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Weights of a format at which the kernels are compiled, tested and timed; `specs.py` adds the sizes.

    Attributes:
        name: of the variant; "" is every projection of every model.
        input_bits: 16 for float inputs, else of their codes.
        group_size: inputs per scale; -1 per channel.
        scale_dtype: of the canonical scales.
        zeros, minima: the weight has them.
    """

    name: str = ""
    input_bits: int
    group_size: int
    scale_dtype: str = "float16"
    zeros: bool = False
    minima: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How weights are coded. Subclasses say what differs; `kernel.KernelFormat` is what the kernels can read.

    Attributes:
        code_dtype: of the canonical codes.
        levels: tells formats over the same codes apart, as `QuantizedWeight.levels` does.
    """

    code_dtype: str
    levels: str = "single"
    # Scales of groups make int8 weights, and `channel_scales` are floats over those.
    two_level: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Unique in the registry."""
        return self.code_dtype if self.levels == "single" else self.levels

    @property
    def bits(self) -> int:
        """Of a stored code."""
        return dtype_bits(jnp.dtype(self.code_dtype))

    @property
    def integer(self) -> bool:
        """Codes are integers."""
        return bool(jnp.issubdtype(jnp.dtype(self.code_dtype), jnp.integer))

    def op(self, input_bits: int) -> str:
        """The name of the product with inputs of so many bits (16: floats), in tables, messages and results."""
        if input_bits == 16:
            return f"matmul_w{self.bits}a16"
        return self._quantized_op(input_bits)

    def _quantized_op(self, input_bits: int) -> str:
        raise NotImplementedError

    def backends(self, input_bits: int) -> tuple[str, ...]:
        """Implementations that the op has, fastest first; others are refused by name."""
        raise NotImplementedError

    def refuses_kernels(self) -> str | None:
        """Why no kernel reads these codes, or None."""
        return f"codes are {self.code_dtype}; the kernels take integer codes"

    def variants(self) -> tuple[Variant, ...]:
        """What the kernels are compiled and timed at."""
        return ()

    def random_tables(
        self, rng: np.random.Generator, outputs: int, groups: int
    ) -> dict[str, np.ndarray]:
        """Scales and whatever else weights of this format have beside codes, of usual sizes, for tests."""
        return dict(scales=rng.uniform(0.005, 0.02, (outputs, groups)).astype(np.float16))

    def values(self, codes: Shaped[Array, "N K"], dtype) -> Shaped[Array, "N K"]:
        """What codes stand for before zeros and scales, in `dtype` (float32, or int8 for integer codes)."""
        return codes.astype(dtype)

    def runtime(self, weight: QuantizedWeight) -> tuple[Shaped[Array, "N K"], Float[Array, "N G"]]:
        """The weight that a quantized product multiplies, and its float32 scales (minima apart).

        Integer codes come back as int8, floating-point codes as they are. Two-level weights come
        back with one scale per output feature (G = 1).
        """
        codes, scales = jnp.asarray(weight.codes), weight.scales.astype(jnp.float32)
        if self.integer:
            codes = self.values(codes, jnp.int8)
        if weight.zeros is not None:
            zeros = weight.zeros.astype(jnp.int8)[..., None]
            codes = (grouped(codes, weight.group_size) - zeros).reshape(codes.shape)
        return codes, scales

    def dequantize(self, weight: QuantizedWeight, dtype=jnp.float32) -> Float[Array, "N K"]:
        """The weight in float32, rounded once to `dtype`; columns in the order of the codes."""
        if self.two_level:
            values, scales = self.runtime(weight)
            values = values.astype(jnp.float32)
        else:
            values = self.values(jnp.asarray(weight.codes), jnp.float32)
            scales = weight.scales.astype(jnp.float32)
            if weight.zeros is not None:
                values = grouped(values, weight.group_size)
                values = values - weight.zeros.astype(jnp.float32)[..., None]
        values = values.reshape(values.shape[0], scales.shape[1], -1) * scales[..., None]
        if weight.minima is not None:
            values = values + weight.minima.astype(jnp.float32)[..., None]
        return values.reshape(weight.codes.shape).astype(dtype)
